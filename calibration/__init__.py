"""Post-training quantisation: ranges, smoothing, Q/DQ graphs. Nothing is here yet."""
