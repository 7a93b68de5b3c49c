"""Checkpoints on disk: directories of save_pretrained, and LAVIS files."""
