"""Reuses what was computed for earlier frames of a live source where a frame hardly differs."""
