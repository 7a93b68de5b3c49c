"""INT8 activations: observe, smooth, choose ranges, write Q/DQ."""
