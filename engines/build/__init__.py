"""From a checkpoint to a bundle: loaded, exported to ONNX, compiled to plans, stored and verified.

Knows families and what they say of a model; runs none of what it makes.
"""
