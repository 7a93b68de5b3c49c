"""Families of checkpoints: how their ``config.json`` is read and written, and their prompt formats."""
