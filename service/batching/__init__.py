"""What the engine does next: accepted rows wait here, share engine calls and are answered once.

The scheduler is pure arithmetic; the loop alone runs threads. Knows no HTTP and no metrics library.
"""
