"""Builds the model that a recipe describes from trained and new parts."""
