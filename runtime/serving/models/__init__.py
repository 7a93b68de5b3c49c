"""The bundles of a server, and the requests that a bundle for retrieval answers."""
