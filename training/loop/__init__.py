"""The training loop: optimiser, log, and snapshots to resume from."""
