"""Builds TensorRT engines from the ONNX graphs of a bundle; imports no torch."""
