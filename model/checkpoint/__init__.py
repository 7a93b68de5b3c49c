"""Reads and writes checkpoints: directories of transformers' ``save_pretrained``, and files of LAVIS (read only)."""
