"""Captions by the million: from folders, shards, tables and object stores to tables or shards, with exact resume."""
