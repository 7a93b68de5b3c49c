"""INT8 activations: observe values, choose ranges, write QuantizeLinear and DequantizeLinear."""
