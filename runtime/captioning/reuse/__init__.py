"""Reuses results of earlier frames of a live source if a frame hardly differs from them."""
