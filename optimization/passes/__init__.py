"""Rewrites of a graph for one backend, a module each."""
