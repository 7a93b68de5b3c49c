"""Writes outputs: locks, atomic renames, errors of the disk."""
