"""Checkpoints under evaluation, run in torch."""
