"""Reads pictures with known captions or answers, and decides whether a generated text is right.

Used by ``calibrate --references``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from blip2edge.errors import UsageError, option
from blip2edge.training.data.detect import detect_data
from blip2edge.training.data.entries import StoredPicture, by_picture
from blip2edge.training.data.registry import read_entries
from blip2edge.training.metrics.captions import rouge_l
from blip2edge.training.metrics.tokens import words
from blip2edge.training.metrics.vqa import answer_accuracy

HALF = 0.5
"""Smallest VQA accuracy of a right answer."""

_BRACKETS = frozenset(["-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"])  # names of brackets among the tokens


@dataclass(frozen=True)
class KnownText:
    """A picture with its right captions, or a question on it with its right answers.

    Attributes:
        name: Name of the picture or question in messages.
        picture: The picture.
        texts: The captions or answers.
        question: The question; empty for captions.
        right_at: Smallest score at which a text is right, see :func:`read_references`; None for the default rule.
    """

    name: str
    picture: StoredPicture
    texts: tuple[str, ...]
    question: str = ""
    right_at: float | None = None

    @property
    def identity(self) -> str:
        """Returns the key of the picture; pictures with equal keys are the same picture."""
        return self.picture.identity

    def open(self) -> Image.Image:
        """Decodes the picture; raises ImageError."""
        return self.picture.open()

    def is_right(self, text: str) -> bool:
        """Returns whether a generated text is right."""
        if self.question:
            return answer_accuracy(text, self.texts) >= (HALF if self.right_at is None else self.right_at)
        if self.right_at is None:
            return without_punctuation(text) in map(without_punctuation, self.texts)
        return rouge_l([words(text)], [[words(one) for one in self.texts]]) >= self.right_at


def without_punctuation(text: str) -> str:
    """Returns the words of a text in lower case, without punctuation at their ends, separated by spaces.

    :func:`words` drops only the punctuation that the COCO evaluation drops. It keeps ``!!``, ``?!``, brackets and the
    full stop of an abbreviation.
    """
    kept = (_stripped(token) for token in words(text).split() if token not in _BRACKETS)
    return " ".join(token for token in kept if token)


def _stripped(token: str) -> str:
    """Returns a token without the punctuation at its ends (Unicode categories P*)."""
    return token.strip("".join(sign for sign in set(token) if unicodedata.category(sign).startswith("P")))


def read_references(
    data: str, *, annotations: str | None, max_broken: int, right_at: float | None
) -> tuple[Sequence[KnownText], str, tuple[str, ...]]:
    """Reads references in the formats of ``eval --data``.

    Args:
        data: COCO's JSON of captions or of VQA questions, a folder of pictures with texts, tar shards, or a recipe.
        annotations: File of the answers to VQA's questions; None for the file beside the questions.
        max_broken: Largest number of missing or broken samples.
        right_at: Smallest score at which a text is right: ROUGE-L of a caption, VQA accuracy of an answer. None: a
            caption must be equal to a reference, apart from case and punctuation; an answer must have an accuracy of
            at least :data:`HALF`.

    Returns:
        The references, the rule as a sentence, and a warning if samples are left out: their number, and the first with
        the reason.

    Raises:
        DataError: The data cannot be read, or has no usable sample.
        UsageError: ``right_at`` is not above 0 and at most 1.
    """
    if right_at is not None and not 0 < right_at <= 1:
        raise UsageError(f"expected {option('right_at')} above 0 and at most 1, got {right_at:g}")
    config, base = detect_data(data, None, annotations, max_broken)
    found, broken = read_entries(config, base=base)
    entries = list(found)
    if not entries:
        raise broken.none_usable("picture with a text")
    if entries[0].question:
        asked = [
            KnownText(one.sample_id, one.picture, one.answers, one.question, right_at) for one in entries if one.answers
        ]
        unknown = {one.sample_id: "it has no answer" for one in entries if not one.answers}
        rule = f"VQA accuracy of at least {HALF if right_at is None else right_at:g}"
        return asked, rule, _left_out({**broken.problems, **unknown})
    rule = "equal to a reference" if right_at is None else f"ROUGE-L of at least {right_at:g}"
    groups = by_picture(entries)
    known = [
        KnownText(one.image_id, one.picture, tuple(one.captions), right_at=right_at) for one in groups if one.captions
    ]
    unknown = {one.image_id: "it has no caption" for one in groups if not one.captions}
    return known, rule, _left_out({**broken.problems, **unknown})


def _left_out(problems: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the warning about samples that cannot be used, given the problem of each; empty if there are none."""
    if not problems:
        return ()
    name, problem = next(iter(problems.items()))
    count = "1 reference is" if len(problems) == 1 else f"{len(problems)} references are"
    return (f"{count} left out; the first is {name}: {problem}",)
