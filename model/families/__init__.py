"""Families of checkpoints: reads and writes the ``config.json`` of each family, and gives its prompt format."""
