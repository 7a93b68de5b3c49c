"""Converts texts to token ids and back, and prompts to the language model's input."""
