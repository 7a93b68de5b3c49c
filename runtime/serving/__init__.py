"""Captions over HTTP (``serve``), and captions of cameras, videos and folders as they change (``watch``)."""
