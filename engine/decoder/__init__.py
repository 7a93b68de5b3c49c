"""Rewrites the exported decoder for KV caches of constant capacity, and makes the graph that runs between two steps."""
