"""Fits the confidence of a bundle on pictures with known captions; the runtime applies it."""
