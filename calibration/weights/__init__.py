"""INT8 and INT4 weights in blocks."""
