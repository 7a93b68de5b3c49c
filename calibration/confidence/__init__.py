"""Fits the confidence of a bundle on pictures with known captions; the runtime computes confidences with this fit."""
