"""Hashes of files, and signatures of bundles."""
