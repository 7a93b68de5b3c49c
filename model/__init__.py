"""The models in PyTorch, and the checkpoints that they are read from and written to."""
