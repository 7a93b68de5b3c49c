"""What runs on the device: numpy, pillow and tokenizers; a backend is an extra."""
