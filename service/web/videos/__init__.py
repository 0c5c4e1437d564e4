"""Clips: `/v1/videos` in OpenAI's shape, as jobs that outlast their request, or answered at once.

Knows drawing, encoding and a folder of what is kept; of a model it knows what it says of itself.
"""
