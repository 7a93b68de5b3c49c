"""Three kinds of KV cache for the decoder: growing, written in place, and with a fixed number of slots."""
