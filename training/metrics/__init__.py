"""What an answer is worth: captions, answers, retrieval, things that are not there. Needs no torch."""

from blip2edge.training.metrics.exact import exact_match, shuffled_match

__all__ = ["exact_match", "shuffled_match"]
