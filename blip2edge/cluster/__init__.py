"""Runs work on many machines."""
