"""Chooses the number formats of layers and graphs by measurements.

``--drop-limit`` chooses the layers that stay in floating point. ``--search`` chooses a format for the vision encoder,
the bridge and the language model.
"""
