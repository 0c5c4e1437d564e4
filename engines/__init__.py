"""Turns a diffusers checkpoint into compiled parts and runs them. Knows nothing of HTTP or Ray."""
