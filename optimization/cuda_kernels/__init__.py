"""The optimized copy for the backend ``cuda-decoder``: layout of the decoder, compiled kernels, and their timing."""
