"""The code of ``bench``, ``certify``, ``doctor`` and ``plan``: measures, compares, checks and predicts."""
