"""The service as Ray Serve runs it: deployment, scaling, proxy and placement on this machine.

Only here is Ray imported. Knows no request.
"""
