"""The version of the package blip2edge."""

__version__ = "0.1.0"
