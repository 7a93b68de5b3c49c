"""The torch side: one module an architectural block, and the checkpoints they are read from."""
