"""Runs checkpoints in torch, for evaluation."""
