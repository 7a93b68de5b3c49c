"""TensorRT engines: sessions, the KV cache on the GPU, CUDA graphs."""
