"""Computes the exact match of captions, and as a control the match with shuffled captions. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from blip2edge.errors import DataError


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Computes the share of captions that equal their reference, apart from spaces at the ends.

    Args:
        predictions: Generated captions.
        references: Correct captions, in the same order.

    Returns:
        The share, between 0 and 1.

    Raises:
        DataError: There are no captions, or the two lists differ in length.
    """
    if len(predictions) != len(references) or not references:
        raise DataError(f"expected one caption for each of the pictures, got {len(predictions)} for {len(references)}")
    pairs = zip(predictions, references, strict=True)
    return sum(said.strip() == right.strip() for said, right in pairs) / len(references)


def shuffled_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Computes the share of captions that equal the next picture's reference, as a control.

    If the captions do not depend on the pictures, this score is about as high as the exact match. If they do, this
    score is almost 0, because neighbouring pictures seldom have equal references.

    Args:
        predictions: Generated captions.
        references: Correct captions, in the same order; at least two.

    Returns:
        The share, between 0 and 1.

    Raises:
        DataError: There are fewer than two captions, or the two lists differ in length.
    """
    if len(references) < 2:
        raise DataError(f"shuffling needs at least two pictures, got {len(references)}")
    return exact_match(predictions, [*references[1:], references[0]])
