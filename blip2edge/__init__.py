"""blip2edge: from a trained BLIP-2-style captioner to captions on an edge device."""

__version__ = "0.1.0"
