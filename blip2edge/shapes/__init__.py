"""Sizes of models: counts parameters, bytes and operations from a config alone, without weights and without torch.

The shape of a model, in this package, is all its sizes: its weight matrices, and the tokens that they multiply.
"""
