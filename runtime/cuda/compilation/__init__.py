"""Compiles the kernels, and reads what a compiled kernel needs."""
