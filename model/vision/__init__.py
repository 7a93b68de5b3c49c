"""Vision encoders: they map pictures to embeddings."""
