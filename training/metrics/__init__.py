"""Metrics of captions, short answers, retrieval and hallucination. Needs no torch."""

from blip2edge.training.metrics.exact import exact_match, shuffled_match

__all__ = ["exact_match", "shuffled_match"]
