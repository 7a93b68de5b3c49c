"""Writes ``report.json`` and ``report.html``."""
