"""Samples to batches: loading, tokenising, cached features."""
