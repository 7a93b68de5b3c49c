"""Runs TensorRT engines, with the KV cache on the GPU and decode steps as CUDA graphs."""
