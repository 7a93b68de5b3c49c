"""The decoder with three kinds of KV cache: growing, written in place, and with a fixed number of slots."""
