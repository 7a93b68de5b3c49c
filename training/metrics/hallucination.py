"""Hallucination metrics: objects that a caption names and the picture does not show.

CHAIR (Rohrbach et al., arXiv 1809.02156) counts such objects in captions. POPE (Li et al., arXiv 2305.10355) has
yes-no questions: each question asks whether one object is in the picture. On the scenes an object is a (colour,
shape), such as ("red", "circle"), and all objects of a picture are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blip2edge.errors import DataError
from blip2edge.training.data.scenes import COLOURS, SHAPES, Kind, Scene
from blip2edge.training.metrics.tokens import words

NEGATIVES = ("random", "popular", "adversarial")


def things_named(caption: str) -> list[Kind]:
    """Finds the objects that a caption names, in the order of the text.

    Args:
        caption: Any text.

    Returns:
        A (colour, shape) for every shape in the text; the colour is empty if none precedes the shape.
    """
    named, colour = [], ""
    for word in words(caption).split():
        if word in SHAPES:
            named.append((colour, word))
            colour = ""
        elif word in COLOURS:
            colour = word
    return named


def things_shown(scene: Scene) -> tuple[Kind, Kind]:
    """Returns the two objects of a scene as (colour, shape)."""
    return scene.first.kind, scene.second.kind


def _is_there(thing: Kind, shown: Sequence[Kind]) -> bool:
    """Returns whether an object is in a picture; an object without a colour only needs an equal shape."""
    return any(thing[1] == shape and thing[0] in ("", colour) for colour, shape in shown)


def chair(captions: Sequence[str], shown: Sequence[Sequence[Kind]]) -> dict[str, float]:
    """Computes CHAIR, the share of hallucinated objects, of a set of captions.

    Args:
        captions: One caption for each picture.
        shown: The objects in each picture.

    Returns:
        `chair_i`: share of the named objects that are not in the picture; `chair_s`: share of the captions that name
        such an object; `chair_recall`: share of the shown objects that are named. Empty captions have perfect values
        of the first two, but a recall of 0.

    Raises:
        DataError: There is no caption, or the two lists differ in length.
    """
    if not captions or len(captions) != len(shown):
        raise DataError(f"expected one caption for each of the {len(shown)} pictures, got {len(captions)}")
    named = [things_named(caption) for caption in captions]
    absent = [[not _is_there(thing, there) for thing in things] for things, there in zip(named, shown, strict=True)]
    found = sum(thing in things for things, there in zip(named, shown, strict=True) for thing in there)
    return {
        "chair_i": sum(map(sum, absent)) / max(1, sum(map(len, absent))),
        "chair_s": sum(map(any, absent)) / len(captions),
        "chair_recall": found / sum(map(len, shown)),
    }


@dataclass(frozen=True)
class PopeQuestion:
    """A yes-no question of POPE.

    Attributes:
        picture: Number of the picture.
        thing: The object in the question.
        shown: An object in the picture: equal to `thing`, or the object that :meth:`statement` replaces by `thing`.
        negatives: How an absent object was drawn ("random", "popular", "adversarial"); empty for a shown object.
    """

    picture: int
    thing: Kind
    shown: Kind
    negatives: str = ""

    @property
    def there(self) -> bool:
        """Returns the correct answer: whether the object in the question is in the picture."""
        return self.thing == self.shown

    @property
    def question(self) -> str:
        """Returns the question as text."""
        return f"Is there a {self.thing[0]} {self.thing[1]} in the picture?"

    def statement(self, caption: str) -> str:
        """Returns the picture's caption, in which the name of ``shown`` is replaced by the name of ``thing``."""
        return caption.replace(" ".join(self.shown), " ".join(self.thing))


def pope_questions(shown: Sequence[tuple[Kind, Kind]], *, seed: int = 0) -> list[PopeQuestion]:
    """Makes POPE's questions on scenes: for each shown object, one question on it and three on absent objects.

    Args:
        shown: The two objects of each picture.
        seed: Seed of the drawn objects.

    Returns:
        For each of a picture's two objects: a question on it, one on an object drawn from all that are absent
        ("random"), one on an absent object of the most frequent third of the set ("popular"), and one on an absent
        object that has the same shape or colour ("adversarial").
    """
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    counts = {thing: sum(thing in there for there in shown) for thing in every}
    popular = sorted(every, key=lambda thing: -counts[thing])[: len(every) // 3]
    rng = np.random.default_rng(seed)
    asked = []
    for picture, there in enumerate(shown):
        for thing in there:
            near = [other for other in every if (other[0] == thing[0]) != (other[1] == thing[1])]
            asked.append(PopeQuestion(picture, thing, thing))
            for name, pool in zip(NEGATIVES, (every, popular, near), strict=True):
                absent = [other for other in pool if other not in there]
                asked.append(PopeQuestion(picture, absent[int(rng.integers(len(absent)))], thing, name))
    return asked


def said_yes(answer: str) -> bool:
    """Decides whether an answer means yes, by POPE's rule: no if its first sentence has "no" or "not", else yes."""
    first = set(words(answer.partition(".")[0]).split())
    return not first & {"no", "not", "n't"} and bool(first)


def pope(asked: Sequence[PopeQuestion], yes: Sequence[bool]) -> dict[str, dict[str, float]]:
    """Computes POPE's scores from the answers to its questions.

    Args:
        asked: The questions.
        yes: Whether the model answered yes, for each question.

    Returns:
        For each way in which absent objects were drawn: `accuracy`, `precision`, `recall` and `f1` of the answer yes,
        and `yes`, the share of yes answers. All questions on shown objects count for each way.

    Raises:
        DataError: There is no question, or the two lists differ in length.
    """
    if not asked or len(asked) != len(yes):
        raise DataError(f"expected one answer for each of the {len(asked)} questions, got {len(yes)}")
    figures = {}
    for name in NEGATIVES:
        rows = [(probe.there, said) for probe, said in zip(asked, yes, strict=True) if probe.negatives in ("", name)]
        right_yes = sum(there and said for there, said in rows)
        all_yes, all_there = sum(said for _, said in rows), sum(there for there, _ in rows)
        figures[name] = {
            "accuracy": sum(there == said for there, said in rows) / len(rows),
            "precision": right_yes / max(1, all_yes),
            "recall": right_yes / max(1, all_there),
            "f1": 2 * right_yes / max(1, all_yes + all_there),
            "yes": all_yes / len(rows),
        }
    return figures
