"""Bridges between vision encoder and language model, and the Q-Former's text head."""
