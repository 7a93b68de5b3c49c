"""Gives the exported decoder a KV cache of constant capacity, and makes the graph that runs between two steps."""
