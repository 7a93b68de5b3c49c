"""The training loop: optimiser, journal, snapshots to resume from."""
