"""Captions pictures (one by one, in batches, or as requests arrive), and compares pictures with texts."""
