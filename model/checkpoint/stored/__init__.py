"""The files of a checkpoint: finds them, and reads their tensors and JSON objects."""
