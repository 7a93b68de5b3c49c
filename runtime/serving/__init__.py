"""Captions over HTTP, and of live pictures."""
