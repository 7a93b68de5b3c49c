"""What a caption is worth. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from blip2edge.errors import DataError


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of captions that are right to the last letter, blanks at the ends aside.

    Args:
        predictions: What the captioner said.
        references: What was right, in the same order.

    Returns:
        Between 0 and 1.

    Raises:
        DataError: No captions, or two lists of different length.
    """
    if len(predictions) != len(references) or not references:
        raise DataError(
            f"expected one caption for each of the pictures, got {len(predictions)} for {len(references)}"
        )
    pairs = zip(predictions, references, strict=True)
    return sum(said.strip() == right.strip() for said, right in pairs) / len(references)


def shuffled_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Exact match when every caption is held against the next picture's: what a blind captioner would get.

    A captioner that ignores its picture scores the same here as on the right pictures; one that looks scores
    next to nothing, the rare neighbours with equal captions.

    Args:
        predictions: What the captioner said.
        references: What was right, in the same order; at least two.

    Returns:
        Between 0 and 1.

    Raises:
        DataError: As for `exact_match`, or fewer than two captions.
    """
    if len(references) < 2:
        raise DataError(f"shuffling needs at least two pictures, got {len(references)}")
    return exact_match(predictions, [*references[1:], references[0]])
