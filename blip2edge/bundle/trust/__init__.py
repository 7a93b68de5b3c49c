"""Checks the hashes of files and the signatures of bundles."""
