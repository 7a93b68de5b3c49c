"""Exports a torch checkpoint to a bundle of ONNX graphs, and compares the graphs with the checkpoint."""
