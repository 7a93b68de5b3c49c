"""Backends: they load and run graphs. Also detects processor, GPUs and providers of this machine."""
