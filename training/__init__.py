"""Training of the bridge, and of the miniature that ships.

Import the submodule you need: `scenes`, `split`, `metrics` and `evaluate` work without torch,
so that a bundle can be scored on a machine that only runs it; the others need the `train` extra.
"""
