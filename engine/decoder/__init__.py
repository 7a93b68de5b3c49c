"""Gives the exported decoder a KV cache of constant capacity, and makes the graph between two decode steps."""
