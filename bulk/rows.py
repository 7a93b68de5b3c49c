"""The row of the output that holds the captions of one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DIGITS = 6
"""Number of decimals to which log-probabilities and similarities are rounded."""

LISTS = ("captions", "logprobs", "confidences")
"""Fields of a row that are lists, with one value for each caption."""


@dataclass(frozen=True)
class Row:
    """The captions of one picture, written as a row of a table or as the JSON file of a shard's sample.

    Attributes:
        image: Name of the picture in the source.
        captions: Captions of the picture; empty if the picture is broken. A duplicate has the captions of its original.
        logprobs: The log-probability of each caption: the sum over its tokens, natural logarithm.
        confidences: The confidence of each caption; None if the bundle has no fitted confidence. A caption is empty if
            its confidence is below ``abstain_below``.
        duplicate_of: Name of the original (an earlier, similar picture) if this picture is a duplicate, else None.
        similarity: Cosine of the embeddings of this picture and its original; None if there is no original.
        error: Why there is no caption; None if the picture has a caption.
    """

    image: str
    captions: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    confidences: tuple[float | None, ...] = ()
    duplicate_of: str | None = None
    similarity: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the row as a JSON object."""
        return {**vars(self), **{name: list(getattr(self, name)) for name in LISTS}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """Makes a row from a JSON object that :meth:`to_json` returned."""
        return cls(**{**values, **{name: tuple(values.get(name, ())) for name in LISTS}})


@dataclass(frozen=True)
class Original:
    """The original of a duplicate: the earlier picture that is most similar to the duplicate.

    Attributes:
        number: Number of the original in the source.
        similarity: Cosine of the embeddings of the duplicate and the original.
    """

    number: int
    similarity: float
