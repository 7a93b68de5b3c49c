"""What runs on the device: numpy, Pillow, tokenizers and one backend; never torch."""
