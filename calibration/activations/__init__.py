"""Makes activations INT8: observes their values, chooses their ranges, writes QuantizeLinear and DequantizeLinear."""
