"""From a torch checkpoint to a verified bundle of ONNX graphs."""
