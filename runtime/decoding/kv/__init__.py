"""The decoder's KV cache in three forms: growing, written in place, of fixed capacity."""
