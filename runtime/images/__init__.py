"""Pictures and videos to pixel values, on NumPy and Pillow alone."""
