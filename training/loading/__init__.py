"""Makes batches of samples: opens pictures, encodes or caches them, and tokenizes texts."""
