"""The package that runs on the device. It needs numpy, pillow and tokenizers; each backend is an extra."""
