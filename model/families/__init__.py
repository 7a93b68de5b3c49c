"""Families of checkpoints: how a config is read, which parts it names, how a prompt looks."""
