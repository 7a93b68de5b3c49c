"""Converts pictures and videos to pixel values, with NumPy and Pillow only."""
