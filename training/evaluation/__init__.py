"""Scores of a checkpoint or a bundle on a data set."""
