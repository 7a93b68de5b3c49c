"""Quantizes weights only, not activations: INT8 and INT4 weights in blocks, rounded by GPTQ."""
