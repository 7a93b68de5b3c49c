"""The bundle, the directory that is deployed: its schema, manifest, file hashes and token table."""
