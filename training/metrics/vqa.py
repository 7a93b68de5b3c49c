"""Computes the accuracy of short answers by the rules of the VQA challenge (Antol et al., arXiv 1505.00468).

Ten people answered each question. The score of an answer is min(1, n/3), where n of nine people gave the same answer,
averaged over the ten ways to choose nine. Answers are normalised first: punctuation and articles are removed, number
words become digits, contractions get their apostrophe. All rules and special cases are those of the challenge's own
program, so that values are comparable.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from blip2edge.errors import DataError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # largest number of full stops removed: the challenge's program passes a flag (32) as the count
_ARTICLES = frozenset(["a", "an", "the"])
_SPOKEN = "one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", "zero": "0"} | {word: str(number) for number, word in enumerate(_SPOKEN.split(), start=1)}
# Each is also recognised without any one of its apostrophes.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)


def _without_one_apostrophe() -> dict[str, str]:
    """Returns a mapping from contractions with a missing apostrophe to the correct contractions."""
    meant = {"somebody'd": "somebodyd"}  # the challenge's table has this one entry in the reverse direction
    for word in _CONTRACTIONS.split():
        for at in (place for place, letter in enumerate(word) if letter == "'"):
            meant[word[:at] + word[at + 1 :]] = word
    return meant


_MEANT = _without_one_apostrophe()


def _unspaced(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(answer: str) -> str:
    """Normalises an answer as VQA's evaluation does, so that answers can be compared.

    Args:
        answer: The original answer.

    Returns:
        The answer in lower case with single spaces.
    """
    text = _unspaced(answer)
    digits = _COMMA_IN_NUMBER.search(text) is not None
    written = text
    for sign in _PUNCTUATION:
        beside_blank = f"{sign} " in written or f" {sign}" in written
        text = text.replace(sign, "" if beside_blank or digits else " ")
    text = _FULL_STOP.sub("", text, count=_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_MEANT.get(word, word) for word in words if word not in _ARTICLES)


def answer_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Computes VQA's accuracy of one answer.

    Args:
        answer: The model's answer.
        truths: Answers of people, usually ten. If all are equal, nothing is normalised, as in the challenge's program.
            A single answer is compared after normalisation; the accuracy is then 0 or 1.

    Returns:
        The accuracy, between 0 and 1.

    Raises:
        DataError: There is no true answer.
    """
    if not truths:
        raise DataError(
            "a question has no true answer, and VQA accuracy needs at least one",
            "remove the question, or add its answers to the annotations",
        )
    if len(truths) == 1:
        return float(normalise_answer(answer) == normalise_answer(truths[0]))
    answer, truths = _unspaced(answer), [_unspaced(truth) for truth in truths]
    if len(set(truths)) > 1:
        answer, truths = normalise_answer(answer), [normalise_answer(truth) for truth in truths]
    same = [truth == answer for truth in truths]
    return sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / len(same)


def vqa_scores(
    answers: Sequence[str], truths: Sequence[Sequence[str]], kinds: Sequence[Mapping[str, str]]
) -> dict[str, float | dict[str, float]]:
    """Computes the mean accuracy of a set of answers, overall and by kind of question.

    Args:
        answers: One answer for each question.
        truths: The true answers of each question.
        kinds: Groups of each question, such as `{"answer_type": "yes/no"}`; may be empty.

    Returns:
        `vqa_accuracy`, and for each kind of group (such as `answer_type`) the accuracy of its groups; all between 0
        and 1.

    Raises:
        DataError: There is no question, or the lists differ in length.
    """
    if not answers or not len(answers) == len(truths) == len(kinds):
        raise DataError(f"expected one answer for each of the {len(truths)} questions, got {len(answers)}")
    values = [answer_accuracy(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
    sorted_values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for value, kind in zip(values, kinds, strict=True):
        for sorting, name in kind.items():
            sorted_values[sorting][name].append(value)
    scores: dict[str, float | dict[str, float]] = {"vqa_accuracy": sum(values) / len(values)}
    for sorting, groups in sorted(sorted_values.items()):
        scores[sorting] = {name: sum(group) / len(group) for name, group in sorted(groups.items())}
    return scores
