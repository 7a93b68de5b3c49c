"""Faster copies of a bundle's graphs for one backend; neither torch nor onnxscript is imported here."""
