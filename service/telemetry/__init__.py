"""What a replica tells of itself: metrics, traces and whether its event loop is alive.

Only here are the libraries of Prometheus and OpenTelemetry. Decides nothing.
"""
