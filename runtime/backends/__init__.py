"""Backends, which load and run graphs; also detects processor, GPUs and ONNX Runtime's execution providers."""
