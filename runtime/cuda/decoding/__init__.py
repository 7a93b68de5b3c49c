"""Decoding with the kernels: the KV cache on the GPU, and the choice of tokens there."""
