"""Merges PEFT adapters into the tensors of the checkpoint that they were trained on (the base)."""
