"""Captions many pictures: from folders, shards, tables and object stores to tables or shards, with exact resume."""
