"""A model of NVIDIA's Triton Inference Server that captions pictures with a bundle."""
