"""Scores a checkpoint or a bundle on a data set."""
