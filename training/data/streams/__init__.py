"""Mixtures of sources, and random changes of pictures."""
