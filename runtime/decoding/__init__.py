"""Text generation: greedy decoding, sampling, beam search and speculative decoding."""
