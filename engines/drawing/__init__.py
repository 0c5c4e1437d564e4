"""Drawing with a loaded model: which parts it has, and rows on their way through its engine calls.

Whoever serves talks to `runner` alone. Knows no HTTP, no queue and no clock.
"""
