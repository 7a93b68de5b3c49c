"""Describes the pictures with known captions or answers, on which a confidence is fitted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


class Reference(Protocol):
    """A picture whose right captions, or right answers to a question, are known."""

    @property
    def name(self) -> str:
        """Name of the picture in messages."""

    @property
    def identity(self) -> str:
        """Key of the picture; all questions about one picture have the same key."""

    @property
    def question(self) -> str:
        """The question; empty for a caption."""

    def open(self) -> Image.Image:
        """Decodes the picture.

        Raises:
            ImageError: The picture cannot be read.
        """

    def is_right(self, text: str) -> bool:
        """Returns whether a generated text is right."""


@dataclass(frozen=True)
class References:
    """The pictures of a fit, and how their texts are generated.

    Attributes:
        items: The pictures: all with a question, or all without.
        rule: When a text is right, as a sentence for the report.
        prompt: Prompt of the captions; None for the bundle's default.
        options: Fields of ``GenerationOptions``; for a missing field, the bundle's default is used.
        batch_size: Number of pictures that are captioned together.
        warnings: What the user should know about the samples that are not among the items, one line each.
    """

    items: Sequence[Reference]
    rule: str
    prompt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    warnings: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the pixels, the names and the texts of the pictures, and of the options. Every picture is decoded.

        Raises:
            ImageError: A picture cannot be read.
        """
        given = (list(self.items), self.rule, self.prompt, sorted(self.options.items()))
        digest = hashlib.sha256(repr(given).encode())
        for item in self.items:
            picture = item.open()
            digest.update(repr((picture.mode, picture.size)).encode())
            digest.update(picture.tobytes())
        return digest.hexdigest()
