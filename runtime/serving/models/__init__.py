"""The bundles of a server, and what a bundle for retrieval answers."""
