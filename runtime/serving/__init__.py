"""Captions over HTTP (``serve``), and of cameras, videos and folders (``watch``)."""
