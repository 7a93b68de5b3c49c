"""Scores a model on data from files or on the generated scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from blip2edge.choices import Ranking, Split
from blip2edge.errors import UsageError, option
from blip2edge.training.data.entries import AnnotatedPicture, BrokenSamples, Entry, by_picture, opened_pictures
from blip2edge.training.data.scenes import Scene, scenes
from blip2edge.training.evaluation.few_shots import Examples, generate_texts, no_examples
from blip2edge.training.evaluation.models import (
    CaptionModel,
    EvaluatedModel,
    MatchModel,
    Vectors,
    without_captions,
)
from blip2edge.training.evaluation.reader import Reader
from blip2edge.training.evaluation.scene_scores import EVALUATION_SEED, PICTURES_AT_ONCE, evaluate_scenes
from blip2edge.training.metrics.captions import caption_scores
from blip2edge.training.metrics.clip_score import mean_scores
from blip2edge.training.metrics.hallucination import (
    chair,
    pope,
    pope_questions,
    said_yes,
    things_named,
    things_shown,
)
from blip2edge.training.metrics.retrieval import (
    match_pairs,
    pairs_to_match,
    retrieval_scores,
    similarities,
)
from blip2edge.training.metrics.vqa import vqa_scores

CountProgress = Callable[[int, int], None]
TOP: dict[Ranking, int] = {"probability": 16, "lavis": 128}
"""Number of nearest candidates that the matching head ranks again. 128 is LAVIS' ``k_test`` for BLIP-2 on COCO."""

YES = 0.5  # probability of the matching head from which a picture and a text match


@dataclass(frozen=True)
class ScoringOptions:
    """Which metrics are computed, and how.

    Attributes:
        metrics: Names of metrics; empty for all that the model and the data support.
        prompt: Prompt of captions; None for the model's default.
        top: Number of nearest candidates that the matching head ranks again; with 0, only the cosine ranks. None
            for the number in :data:`TOP`.
        ranking: Score by which the matching head ranks candidates: ``probability`` is the head's probability;
            ``lavis`` is the head's logit plus the cosine.
        ask: True: the captioner answers POPE's questions. False: the questions are answered from its captions.
        clip: Model that compares pictures and captions for CLIPScore; None for no CLIPScore.
        reader: Model that answers questions from captions; None for no such score.
        examples: Few-shot examples before each text of the captioner; None for no examples.
        progress: Called with (pictures done, all pictures).
    """

    metrics: tuple[str, ...] = ()
    prompt: str | None = None
    top: int | None = None
    ranking: Ranking = "probability"
    ask: bool = False
    clip: MatchModel | None = None
    reader: Reader | None = None
    examples: Examples | None = None
    progress: CountProgress = field(default=lambda done, total: None)

    def chosen(self, possible: Sequence[str], *, captions: bool = False, questions: bool = False) -> tuple[str, ...]:
        """Returns the metrics to compute.

        Args:
            possible: Metrics that model and data support without a CLIP or a reader.
            captions: Whether there are captions, which a CLIP can score.
            questions: Whether there are questions, which a reader can answer.

        Raises:
            UsageError: A requested metric is not possible, or there is nothing for the CLIP or the reader to do.
        """
        possible = [*possible, *(["clip"] if self.clip else []), *(["reader"] if self.reader else [])]
        for name, fits, needs in (("clip", captions, "captions of pictures"), ("reader", questions, "questions")):
            if name in possible and not fits:
                raise UsageError(
                    f"{option(name)} scores a captioner on {needs}, which this evaluation does not have",
                    f"leave {option(name)} out",
                )
        for name in self.metrics:
            if name not in possible:
                raise UsageError(
                    f"the metric {name} cannot be computed for this model on this data",
                    f"metrics that can be computed: {', '.join(possible)}",
                )
        return self.metrics or tuple(possible)


Figures = dict[str, Any]


def score_scenes(model: EvaluatedModel, count: int, split: Split, options: ScoringOptions) -> Figures:
    """Scores a model on generated scenes.

    Args:
        model: The model.
        count: Number of scenes, at least 2.
        split: Which pairs of (colour, shape) the scenes show: "train" or "heldout".
        options: Which metrics are computed, and how.

    Returns:
        Scores by name. For a captioner: exact match with the scene's caption, as a control exact match with the next
        scene's caption, caption scores, CHAIR and POPE. For a matcher: retrieval, and POPE.

    Raises:
        UsageError: There are too few scenes, or a metric cannot be computed.
    """
    if count < 2:
        raise UsageError(f"an evaluation needs at least 2 pictures, not {count}")
    if options.examples is not None:
        raise no_examples("generated scenes")
    shown = list(scenes(count, split=split, seed=EVALUATION_SEED))
    if model.captioner is not None:
        return _captioned_scenes(model.captioner, shown, split, options)
    if model.matcher is None:
        raise UsageError("expected a captioner or a model that matches pictures with texts, got neither")
    return _compared_scenes(model.matcher, shown, split, options)


def _captioned_scenes(captioner: CaptionModel, shown: list[Scene], split: Split, options: ScoringOptions) -> Figures:
    metrics = options.chosen(("exact", "captions", "chair", "pope"), captions=True)
    said: list[str] = []
    judged: list[Vectors] = []

    def caption_many(pictures: Sequence[Image.Image]) -> list[str]:
        texts = captioner(pictures, [options.prompt] * len(pictures))
        said.extend(texts)
        if options.clip is not None and "clip" in metrics:
            judged.append(options.clip.image_vectors(pictures))
        return texts

    exact = evaluate_scenes(caption_many, len(shown), split=split, progress=options.progress)
    figures: Figures = dict(exact) if "exact" in metrics else {"n": len(shown), "split": split, "seed": exact["seed"]}
    things = [things_shown(scene) for scene in shown]
    if "captions" in metrics:
        figures |= caption_scores(said, [[scene.caption] for scene in shown])
    if options.clip is not None and "clip" in metrics:
        figures |= mean_scores(
            np.concatenate(judged), said, [[scene.caption] for scene in shown], options.clip.text_vectors
        )
    if "chair" in metrics:
        figures |= chair(said, things)
    if "pope" in metrics:
        asked = pope_questions(things)
        if options.ask:
            pictures = [shown[probe.picture].picture for probe in asked]
            answers = captioner(pictures, [captioner.question(probe.question) for probe in asked])
            yes = [said_yes(answer) for answer in answers]
        else:
            named = [set(things_named(text)) for text in said]
            yes = [probe.thing in named[probe.picture] for probe in asked]
        figures["pope"] = {"by": "questions" if options.ask else "captions"} | pope(asked, yes)
    return figures


def _compared_scenes(matcher: MatchModel, shown: list[Scene], split: Split, options: ScoringOptions) -> Figures:
    metrics = options.chosen(("retrieval", "pope") if matcher.has_head else ("retrieval",))
    # Of scenes with equal captions only the first is used: both pictures would match the caption.
    first = {scene.caption: scene for scene in reversed(shown)}
    kept = [scene for scene in shown if first[scene.caption] is scene]
    figures: Figures = {"n": len(kept), "split": split, "seed": EVALUATION_SEED}
    if "retrieval" in metrics:
        vectors = []
        for at in range(0, len(kept), PICTURES_AT_ONCE):
            vectors.append(matcher.image_vectors([scene.picture for scene in kept[at : at + PICTURES_AT_ONCE]]))
            options.progress(min(at + PICTURES_AT_ONCE, len(kept)), len(kept))
        texts = [scene.caption for scene in kept]
        gallery = _Gallery(np.concatenate(vectors), lambda number: kept[number].picture)
        figures |= _retrieval(matcher, gallery, texts, list(range(len(kept))), options)
    if "pope" in metrics:
        asked = pope_questions([things_shown(scene) for scene in kept])
        statements: list[list[str]] = [[] for _ in kept]
        for probe in asked:
            statements[probe.picture].append(probe.statement(kept[probe.picture].caption))
        found: list[float] = []
        for at in range(0, len(kept), PICTURES_AT_ONCE):
            part = [scene.picture for scene in kept[at : at + PICTURES_AT_ONCE]]
            for values in matcher.probabilities(part, statements[at : at + PICTURES_AT_ONCE]):
                found += values
            options.progress(min(at + PICTURES_AT_ONCE, len(kept)), len(kept))
        figures["pope"] = {"by": "matching"} | pope(asked, [value >= YES for value in found])
    return figures


def score_entries(
    model: EvaluatedModel, entries: Sequence[Entry], broken: BrokenSamples, options: ScoringOptions
) -> Figures:
    """Scores a model on data from files.

    Args:
        model: The model.
        entries: Captions, or questions with answers.
        broken: The samples that were broken when the data was read; pictures that cannot be opened are added.
        options: Which metrics are computed, and how.

    Returns:
        Scores by name: BLEU, ROUGE-L and CIDEr-D for captions, VQA accuracy for questions, recalls for a matcher;
        `predictions`, the generated texts in COCO's format; and the broken samples. If only some of the pictures have
        captions, `without_captions` is the number of the others, and the only score is CLIPScore.

    Raises:
        DataError: There is no entry, no picture opens, or more samples are broken than allowed.
        UsageError: The model does not fit the data, or a metric cannot be computed.
    """
    if not entries:
        raise broken.none_usable("sample to score")
    asks = bool(entries[0].question)
    if options.examples is not None:
        if model.captioner is None:
            raise no_examples("a model that compares pictures with texts")
        options.examples.check(model.captioner, questions=asks)
    if model.captioner is not None and asks:
        figures = _asked(model.captioner, entries, broken, options)
    elif model.captioner is not None:
        figures = _captioned(model.captioner, by_picture(entries), broken, options)
    elif model.matcher is not None and not asks:
        options.chosen(("retrieval",))
        figures = _retrieved(model.matcher, by_picture(entries), broken, options)
    else:
        raise UsageError("this model matches pictures with texts, but the data set has questions", "give a captioner")
    problems = broken.problems
    return figures | {"broken": len(problems), "broken_named": dict(list(problems.items())[:10])}


def _captioned(
    captioner: CaptionModel, shown: Sequence[AnnotatedPicture], broken: BrokenSamples, options: ScoringOptions
) -> Figures:
    bare = sum(not each.captions for each in shown)
    metrics = options.chosen(() if bare else ("captions",), captions=True)
    if not metrics:
        raise without_captions(UsageError, broken.name, bare, len(shown))
    said: dict[int, str] = {}
    judged: list[Vectors] = []
    pictures = [(each.image_id, each.picture) for each in shown]
    for numbers, images in opened_pictures(pictures, broken, options.progress, PICTURES_AT_ONCE):
        prompts = [options.prompt] * len(images)
        asked = [shown[number].entries[0] for number in numbers]
        said |= dict(zip(numbers, generate_texts(captioner, asked, images, prompts, options.examples), strict=True))
        if options.clip is not None and "clip" in metrics:
            judged.append(options.clip.image_vectors(images))
    texts, references = list(said.values()), [shown[number].captions for number in said]
    scores: Figures = dict(caption_scores(texts, references)) if "captions" in metrics else {}
    if options.clip is not None and "clip" in metrics:
        scores |= mean_scores(np.concatenate(judged), texts, references, options.clip.text_vectors)
    predictions = [
        {"image_id": _as_in_data(shown[at].image_id, shown[at].entries[0]), "caption": text}
        for at, text in said.items()
    ]
    partly = {"without_captions": bare} if 0 < bare < len(shown) else {}
    return {"n": len(said), **partly, **scores, "predictions": predictions}


def _asked(
    captioner: CaptionModel, entries: Sequence[Entry], broken: BrokenSamples, options: ScoringOptions
) -> Figures:
    """Returns the scores on questions.

    The captioner's own answers are scored, and the answers that a reader gives from the captioner's captions.
    """
    metrics = options.chosen(("vqa",), questions=True)
    if "reader" in metrics and options.examples is not None:
        raise no_examples("captions for a reader")
    figures: Figures = {}
    if "vqa" in metrics:
        figures = _answered(captioner, entries, broken, options)
    if options.reader is not None and "reader" in metrics:
        read = _read(captioner, options.reader, entries, broken, options)
        figures = {**read, **figures}
    return figures


def _read(
    captioner: CaptionModel, reader: Reader, entries: Sequence[Entry], broken: BrokenSamples, options: ScoringOptions
) -> Figures:
    """Returns the VQA accuracy of a reader that gets only the captions, and its accuracy without captions."""
    shown = by_picture(entries)
    pictures = [(each.image_id, each.picture) for each in shown]
    texts: list[str] = []
    asked: list[Entry] = []
    for numbers, images in opened_pictures(pictures, broken, options.progress, PICTURES_AT_ONCE):
        for number, caption in zip(numbers, captioner(images, [options.prompt] * len(images)), strict=True):
            asked += shown[number].entries
            texts += [caption] * len(shown[number].entries)
    questions, truths = [entry.question for entry in asked], [entry.answers for entry in asked]
    kinds = [entry.kinds for entry in asked]
    with_caption = vqa_scores(reader(texts, questions), truths, kinds)
    blind = vqa_scores(reader([""] * len(texts), questions), truths, kinds)
    return {
        "n": len(asked),
        "reader_accuracy": with_caption["vqa_accuracy"],
        "blind_accuracy": blind["vqa_accuracy"],
        **{f"reader_{name}": value for name, value in with_caption.items() if name != "vqa_accuracy"},
    }


def _answered(
    captioner: CaptionModel, entries: Sequence[Entry], broken: BrokenSamples, options: ScoringOptions
) -> Figures:
    said: dict[int, str] = {}
    pictures = [(entry.sample_id, entry.picture) for entry in entries]
    for numbers, images in opened_pictures(pictures, broken, options.progress, PICTURES_AT_ONCE):
        prompts = [captioner.question(entries[number].question) for number in numbers]
        wanted = [entries[number] for number in numbers]
        said |= dict(zip(numbers, generate_texts(captioner, wanted, images, prompts, options.examples), strict=True))
    asked = [entries[number] for number in said]
    scores: Mapping[str, Any] = vqa_scores(
        list(said.values()), [entry.answers for entry in asked], [entry.kinds for entry in asked]
    )
    predictions = [
        {"question_id": _as_in_data(entries[number].sample_id, entries[number]), "answer": text}
        for number, text in said.items()
    ]
    return {"n": len(said), **scores, "predictions": predictions}


def _retrieved(
    matcher: MatchModel, shown: Sequence[AnnotatedPicture], broken: BrokenSamples, options: ScoringOptions
) -> Figures:
    usable: list[AnnotatedPicture] = []
    vectors = []
    pictures = [(each.image_id, each.picture) for each in shown]
    for numbers, images in opened_pictures(pictures, broken, options.progress, PICTURES_AT_ONCE):
        usable += [shown[number] for number in numbers]
        vectors.append(matcher.image_vectors(images))
    texts = [text for each in usable for text in each.captions]
    owners = [row for row, each in enumerate(usable) for _ in each.captions]
    if not texts:
        raise broken.none_usable("picture with a caption")
    gallery = _Gallery(np.concatenate(vectors), lambda number: usable[number].picture.open())
    return {"n": len(usable), "texts": len(texts), **_retrieval(matcher, gallery, texts, owners, options)}


class _Gallery(NamedTuple):
    """The pictures among which a retrieval searches.

    Attributes:
        vectors: Unit vectors of the pictures, float32 [N, F], or [N, K, F] if a picture has K vectors.
        open: Opens a picture by its number, for the matching head.
    """

    vectors: Vectors
    open: Callable[[int], Image.Image]


def _retrieval(
    matcher: MatchModel,
    gallery: _Gallery,
    texts: Sequence[str],
    owners: Sequence[int],
    options: ScoringOptions,
) -> Figures:
    """Returns the retrieval recalls. Pictures for the matching head are opened a second time."""
    scores = similarities(gallery.vectors, matcher.text_vectors(texts))
    top = TOP[options.ranking] if options.top is None else options.top
    top = top if matcher.has_head else 0
    lavis = options.ranking == "lavis"
    matched = {}
    if top:
        pairs = pairs_to_match(scores, top)

        def match(image: int, numbers: Sequence[int]) -> Sequence[float]:
            options.progress(image + 1, len(pairs))
            chosen = [[texts[number] for number in numbers]]
            (values,) = matcher.probabilities([gallery.open(image)], chosen, logits=lavis)
            return (scores[image, list(numbers)] + values).tolist() if lavis else values

        matched = match_pairs(pairs, match)
    return {**retrieval_scores(scores, owners, top=top, matched=matched), "reranked": top, "ranking": options.ranking}


def _as_in_data(name: str, entry: Entry) -> int | str:
    """Returns an id of the entry as in the data files: a number, or a text such as ``0042``."""
    return int(name) if entry.numbered and name.isdecimal() else name
