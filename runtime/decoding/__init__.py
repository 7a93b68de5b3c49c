"""From the logits of a prompt to a text: greedy, sampling, beams, speculative decoding."""
