"""The decoder as TensorRT gets it: the forms of its KV cache, and the graph between two decode steps."""
