"""The HTTP surface: routes, schema and parsing, admission, a job and its events, the pages.

Turns bytes into a `Replica`'s work and back. Knows no Ray and calls no engine.
"""
