"""The captioner in torch: vision encoder, Q-Former, projection, language model, checkpoint."""
