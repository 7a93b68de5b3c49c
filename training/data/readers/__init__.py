"""Readers of data formats: tables of rows, Karpathy's splits, and local copies of remote or packed shards."""
