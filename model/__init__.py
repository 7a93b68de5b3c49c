"""The models in PyTorch, and the code that reads and writes their checkpoints."""
