"""Rewrites the decoder for TensorRT: the forms of its KV cache, and the graph between two decode steps."""
