"""Rewrites of a graph for one backend, one module for each."""
