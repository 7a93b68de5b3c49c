"""``--drop-limit``: measures the sensitivity of each layer and keeps the worst in floating point."""
