"""Chooses formats by measuring: layers kept in floating point (``--drop-limit``), formats of parts (``--search``)."""
