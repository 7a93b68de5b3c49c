"""The GPU that kernels run on: its interface, and the implementation with the CUDA driver."""
