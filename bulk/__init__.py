"""Captions many pictures of folders, shards, tables or object stores; writes tables or shards.

If a run is killed, the same command continues it; the output is the same as without the interruption.
"""
