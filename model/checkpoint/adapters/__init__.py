"""PEFT adapters: merged into the tensors of their base."""
