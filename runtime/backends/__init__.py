"""Backends: what loads a graph and runs it, and what this machine has for that."""
