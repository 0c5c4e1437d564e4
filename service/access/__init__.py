"""Who may ask, how much and for what: API keys, limits for each key, the safety filter.

Reads requests and pictures; knows nothing of models, batches or HTTP routes.
"""
