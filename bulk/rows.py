"""The result of one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DIGITS = 6
"""Decimals of log-probabilities and similarities."""

LISTS = ("captions", "logprobs", "confidences")
"""Fields with a value for each caption."""


@dataclass(frozen=True)
class Row:
    """The result of one picture: a row of a table, or the JSON file of a sample.

    Attributes:
        image: Name of the picture in the source.
        captions: Captions of the picture; empty if it is broken. Those of a duplicate are its original's.
        logprobs: The log-probability of each caption: the sum over its tokens, by the model, natural logarithm.
        confidences: The confidence of each caption; None where the bundle has none. A caption is empty if its
            confidence is below ``abstain_below``.
        duplicate_of: Name of the earlier picture that this one resembles; None without one.
        similarity: Cosine of the two pictures' embeddings; None without such a picture.
        error: Why there is no caption; None if there is one.
    """

    image: str
    captions: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    confidences: tuple[float | None, ...] = ()
    duplicate_of: str | None = None
    similarity: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return {**vars(self), **{name: list(getattr(self, name)) for name in LISTS}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """Makes the row from the object that :meth:`to_json` returned."""
        return cls(**{**values, **{name: tuple(values.get(name, ())) for name in LISTS}})


@dataclass(frozen=True)
class Original:
    """The picture that a duplicate resembles.

    Attributes:
        number: Number of the picture in the source.
        similarity: Cosine of the embeddings.
    """

    number: int
    similarity: float
