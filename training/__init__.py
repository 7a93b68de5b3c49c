"""Trains and evaluates captioners, including the miniature that ships with the package.

`data`, `metrics` and the evaluation of bundles work without torch, so that a bundle can be scored on the machine that
runs it. Everything else needs the extra `train`.
"""
