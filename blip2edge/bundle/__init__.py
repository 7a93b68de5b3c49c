"""The bundle, the unit that is deployed: its schema, manifest, seals and token table."""
