"""Rewrites the decoder for TensorRT's kinds of KV cache, and makes the graph between two decode steps."""
