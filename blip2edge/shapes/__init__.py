"""Shapes of models without their weights: parameters, bytes and operations, from a config alone and without torch."""
