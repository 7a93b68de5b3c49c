"""Computes BLEU, ROUGE-L and CIDEr-D of captions; the values equal those of the COCO caption evaluation.

All three scores compare the words from :func:`blip2edge.training.metrics.tokens.words`. A score is one value for a
whole set of pictures; the CIDEr-D of one picture depends on the references of the other pictures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from blip2edge.errors import DataError
from blip2edge.training.metrics.tokens import all_words

Gram = tuple[str, ...]
Grams = Counter[Gram]

MAX_WORDS = 4  # words of the longest n-gram
ROUGE_BETA = 1.2  # weight of recall relative to precision
CIDER_SIGMA = 6.0  # words; width of the penalty on a wrong length
_TINY, _SMALL = 1e-15, 1e-9  # constants of the evaluation server that avoid 0/0 in BLEU


def _grams(words: Sequence[str]) -> Grams:
    """Returns the count of each n-gram of 1 to `MAX_WORDS` words in a caption."""
    return Counter(
        tuple(words[at : at + size]) for size in range(1, MAX_WORDS + 1) for at in range(len(words) - size + 1)
    )


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """Computes BLEU-1 to BLEU-4 (Papineni et al., ACL 2002) of a set of captions.

    The count of an n-gram is limited to its largest count in one reference. Counts are summed over the set before the
    division. The reference length of a caption is the length of that reference whose length is nearest to the
    caption's; if two are equally near, the shorter one counts.

    Args:
        candidates: N captions, tokenised.
        references: The N pictures' reference captions, tokenised.

    Returns:
        Four scores between 0 and 1, for n-grams of up to 1, 2, 3 and 4 words.
    """
    right, said = [0] * MAX_WORDS, [0] * MAX_WORDS
    length = reference_length = 0
    for candidate, all_references in zip(candidates, references, strict=True):
        words = candidate.split()
        texts = [reference.split() for reference in all_references]
        most: Grams = Counter()
        for text in texts:
            most |= _grams(text)
        for gram, count in _grams(words).items():
            right[len(gram) - 1] += min(count, most[gram])
        for size in range(MAX_WORDS):
            said[size] += max(0, len(words) - size)
        length += len(words)
        reference_length += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for size in range(MAX_WORDS):
        product *= (right[size] + _TINY) / (said[size] + _SMALL)
        scores.append(penalty * product ** (1 / (size + 1)))
    return scores[0], scores[1], scores[2], scores[3]


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence of two texts, in words.

    A row of the dynamic-programming table is one integer with one bit for each word (Hyyrö, AWOCA 2004, the LCS
    recurrence), so each word takes a few operations instead of a loop over the other text.
    """
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        hits = row & places.get(word, 0)
        row = (row + hits) | (row - hits)
    return (~row & full).bit_count()


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Computes ROUGE-L (Lin, ACL 2004): F-measure over longest common subsequences, the mean over pictures.

    Precision and recall are each the largest over a picture's references, as in the evaluation server.

    Args:
        candidates: N captions, tokenised.
        references: The N pictures' reference captions, tokenised.

    Returns:
        The score, between 0 and 1.
    """
    total = 0.0
    for candidate, all_references in zip(candidates, references, strict=True):
        words = candidate.split(" ")
        precision = recall = 0.0
        for reference in all_references:
            text = reference.split(" ")
            common = common_subsequence(text, words)
            precision, recall = max(precision, common / len(words)), max(recall, common / len(text))
        if precision and recall:
            weight = ROUGE_BETA**2
            total += (1 + weight) * precision * recall / (recall + weight * precision)
    return total / len(candidates)


def _weighted(grams: Grams, rarity: Mapping[Gram, float], unseen: float) -> tuple[dict[Gram, float], list[float]]:
    """Returns the TF-IDF vector of a caption's n-grams, and the vector's Euclidean norm for each n."""
    vector = {gram: count * rarity.get(gram, unseen) for gram, count in grams.items()}
    squares = [0.0] * MAX_WORDS
    for gram, value in vector.items():
        squares[len(gram) - 1] += value * value
    return vector, [math.sqrt(square) for square in squares]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Computes CIDEr-D (Vedantam et al., arXiv 1411.5726, section 4), the mean over pictures.

    The score of a picture: the cosine of the TF-IDF vectors of caption and reference, with the caption's counts limited
    to those of the reference, times a Gaussian of the difference in length; averaged over the references and over
    n-grams of 1 to 4 words; times 10. Document frequencies are counted in the references of the set.

    Args:
        candidates: N captions, tokenised.
        references: The N pictures' reference captions, tokenised.

    Returns:
        The score, at least 0; it is 0 for a set of one picture, where all document frequencies are equal.
    """
    cooked = [[_grams(reference.split()) for reference in all_references] for all_references in references]
    pictures_with: Counter[Gram] = Counter()
    for all_grams in cooked:
        pictures_with.update(set().union(*all_grams))
    unseen = math.log(len(cooked))
    rarity = {gram: unseen - math.log(count) for gram, count in pictures_with.items()}
    total = 0.0
    for candidate, all_grams in zip(candidates, cooked, strict=True):
        grams = _grams(candidate.split())
        vector, norms = _weighted(grams, rarity, unseen)
        length = sum(count for gram, count in grams.items() if len(gram) == 2)
        score = 0.0
        for reference in all_grams:
            other, other_norms = _weighted(reference, rarity, unseen)
            products = [0.0] * MAX_WORDS
            for gram, value in vector.items():
                if gram in other:
                    products[len(gram) - 1] += min(value, other[gram]) * other[gram]
            cosines = sum(
                product / (norm * other_norm)
                for product, norm, other_norm in zip(products, norms, other_norms, strict=True)
                if norm and other_norm
            )
            difference = length - sum(count for gram, count in reference.items() if len(gram) == 2)
            score += cosines * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
        total += 10 * score / (MAX_WORDS * len(all_grams))
    return total / len(cooked)


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes all caption scores of a set of pictures.

    Args:
        candidates: One caption for each picture, not tokenised.
        references: Reference captions of each picture, not tokenised.

    Returns:
        The scores by name: `bleu_1` to `bleu_4`, `rouge_l` and `cider_d`.

    Raises:
        DataError: There is no picture, the two lists differ in length, or a picture has no reference.
    """
    if not candidates or len(candidates) != len(references):
        raise DataError(f"expected one caption for each of the {len(references)} pictures, got {len(candidates)}")
    lonely = sum(not each for each in references)
    if lonely:
        raise DataError(f"expected reference captions for every picture, {lonely} of {len(references)} have none")
    said, written = all_words(candidates), [all_words(each) for each in references]
    scores = bleu(said, written)
    return {f"bleu_{size}": scores[size - 1] for size in range(1, MAX_WORDS + 1)} | {
        "rouge_l": rouge_l(said, written),
        "cider_d": cider_d(said, written),
    }
