"""Writes the reports of a calibration, ``report.json`` and ``report.html``."""
