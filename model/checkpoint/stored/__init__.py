"""Finds the files of a checkpoint, and reads their tensors and JSON objects."""
