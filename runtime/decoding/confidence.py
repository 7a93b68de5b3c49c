"""Computes the confidence of a text: the estimated probability that it is right, from its tokens' log-probabilities.

A log-probability is the probability of the text in the model; it does not say how often such texts are right. So
``calibrate --references`` fits a function (here called a map) from log-probabilities to the probability of being right,
on pictures with known captions, and stores it in ``bundle.json``. The map is valid only for the bundle, the prompt and
the decoding options of the fit; for other prompts or options there is no confidence.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.manifest import Manifest
from blip2edge.bundle.manifest_fields import ASK, CAPTION
from blip2edge.bundle.prompt_spec import PromptSpec
from blip2edge.choices import FITTED_OPTIONS
from blip2edge.errors import UsageError, option
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.text.prompt import PromptText

FEATURES = ("lowest", "mean", "sum")
"""The three numbers from which a confidence is computed: lowest, mean and sum of the tokens' log-probabilities."""

FLOOR = 1e-4
"""Number that is added to the absolute value of a log-probability, so that the logarithm of the sum is finite."""

FREE_OPTIONS = ("max_new_tokens", "seed", "draft", "top_logprobs", "abstain_below")
"""Options that may differ from those with which a confidence map was fitted: they do not change a text that ends before
the length limit."""

Scores = NDArray[np.float64]


def features(token_logprobs: Sequence[float]) -> Scores:
    """Returns the features of a text, float64 ``[3]``: ``-log(FLOOR - x)`` for each number x of :data:`FEATURES`.

    Likelier texts have larger features. The logarithm spreads the numbers near 0, where most texts are.
    """
    values = token_logprobs or (0.0,)
    raw = np.array([min(values), math.fsum(values) / len(values), math.fsum(values)])
    found: Scores = -np.log(FLOOR - np.minimum(raw, 0.0))
    return found


def decoding_options(options: GenerationOptions) -> dict[str, Any]:
    """Returns the options that differ from their defaults, as JSON values, without those in :data:`FREE_OPTIONS`."""
    defaults = asdict(GenerationOptions())
    given = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    changed: dict[str, Any] = json.loads(
        json.dumps({name: value for name, value in given.items() if value != defaults[name]})
    )
    return changed


def task_of(prompt: PromptText | None, spec: PromptSpec) -> str:
    """Returns :data:`ASK` if a prompt was made by the bundle's template for questions, else :data:`CAPTION`."""
    start, found, end = spec.question.partition("{question}")
    asked = isinstance(prompt, str) and bool(found) and (bool(start + end) or spec.required)
    return ASK if asked and str(prompt).startswith(start) and str(prompt).endswith(end) else CAPTION


@dataclass(frozen=True)
class ConfidenceMap:
    """A fitted map from features to the probability that a text is right.

    ``score = offset + weights @ features``; without knots the probability is the logistic function of the score (Platt,
    1999), else it is interpolated between the knots (isotonic regression).

    Attributes:
        task: :data:`CAPTION` or :data:`ASK`.
        prompt: The prompt that the map was fitted with; the bundle's default if none was given. None for a model
            without a prompt, and for questions.
        options: Decoding options of the fit, as :func:`decoding_options` returns them.
        precisions: Precision of each graph in the bundle with which the map was fitted.
        max_new_tokens: Largest number of generated tokens in the fit.
        offset: The constant of the score.
        weights: The weight of each feature in :data:`FEATURES`.
        knots: Pairs of a score and its probability, both ascending; empty for the logistic function.
        bounds: Lowest and highest probability that the map gives.
    """

    task: str
    prompt: str | None
    options: Mapping[str, Any]
    precisions: Mapping[str, str]
    max_new_tokens: int
    offset: float
    weights: tuple[float, ...]
    knots: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    bounds: tuple[float, float] = (0.0, 1.0)

    def probabilities(self, rows: Scores) -> Scores:
        """Computes the probability ``[N]`` that each text is right, from the features ``[N, 3]`` of the texts."""
        scores = self.offset + rows @ np.array(self.weights)
        found = np.interp(scores, *self.knots) if self.knots[0] else 0.5 * (1.0 + np.tanh(0.5 * scores))
        bounded: Scores = np.clip(found, *self.bounds)
        return bounded

    def confidence(self, token_logprobs: Sequence[float]) -> float:
        """Computes the probability that a text is right, from the log-probabilities of its tokens."""
        return float(self.probabilities(features(token_logprobs)[None])[0])

    def to_json(self) -> dict[str, Any]:
        """Returns the confidence map as a JSON object."""
        return {**vars(self), "weights": list(self.weights), "knots": [list(side) for side in self.knots],
                "bounds": list(self.bounds)}  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ConfidenceMap:
        """Reads a confidence map from the object that :meth:`to_json` made; other keys are ignored."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        lists = {"weights": tuple(known["weights"]), "bounds": tuple(known["bounds"])}
        return cls(**{**known, **lists, "knots": tuple(map(tuple, known["knots"]))})


class Confidence:
    """The confidence maps of a bundle: one :class:`ConfidenceMap` for captions, and one for answers to questions.

    Args:
        manifest: The bundle's manifest. A confidence map is ignored if it was fitted with graphs of other precisions.
            None for a checkpoint, which has no confidence maps.

    Attributes:
        maps: The confidence map of each task (:data:`CAPTION`, :data:`ASK`); empty if none was fitted.
    """

    def __init__(self, manifest: Manifest | None) -> None:
        self.maps: dict[str, ConfidenceMap] = {}
        self._spec = None if manifest is None else manifest.prompt
        if manifest is None:
            return
        precisions = {name: graph.precision for name, graph in manifest.graphs.items()}
        maps = [ConfidenceMap.from_json(values) for values in manifest.confidence.values()]
        self.maps = {one.task: one for one in maps if dict(one.precisions) == precisions}

    def check(self, options: GenerationOptions, prompt: PromptText | None) -> None:
        """Checks that ``abstain_below`` can be used.

        Raises:
            UsageError: ``abstain_below`` is given, but the bundle has no confidence map for these options and prompt.
        """
        if options.abstain_below is None or self._problem(options, prompt) is None:
            return
        raise UsageError(
            f"{option('abstain_below')} needs a confidence: {self._problem(options, prompt)}",
            self._fix(options, prompt),
        )

    def of(self, generated: Generated, options: GenerationOptions, prompt: PromptText | None) -> float | None:
        """Returns the confidence of a text; None if the bundle has no confidence map for these options and this prompt.

        Args:
            generated: The generated text.
            options: The options that the text was generated with.
            prompt: The prompt as the user gave it; None for the bundle's default.
        """
        if self._problem(options, prompt) is not None or self._spec is None:
            return None
        fitted = self.maps[task_of(prompt, self._spec)]
        if generated.finish_reason == "length" and options.max_new_tokens != fitted.max_new_tokens:
            return None  # the text was cut at another length than those of the fit
        return round(fitted.confidence(generated.token_logprobs), 4)

    def _problem(self, options: GenerationOptions, prompt: PromptText | None) -> str | None:
        """Returns why no confidence can be given for these options and this prompt; None if it can be given."""
        if self._spec is None or not self.maps:
            return "the bundle has no fitted confidence"
        task = task_of(prompt, self._spec)
        fitted = self.maps.get(task)
        if fitted is None:
            return f"the bundle has no fitted confidence for {task}"
        filled = self._spec.default if prompt is None else prompt
        if task == CAPTION and filled != fitted.prompt:
            used = "the bundle's own prompt" if fitted.prompt is None else f"the prompt {fitted.prompt!r}"
            return f"the bundle's confidence was fitted with {used}"
        names = _differing(options, fitted)
        others = ", ".join(map(option, names))
        return f"the bundle's confidence was fitted with other values of {others}" if names else None

    def _fix(self, options: GenerationOptions, prompt: PromptText | None) -> str:
        """Returns how to get a confidence for these options and this prompt: options to leave out, a command, or both.

        The command has the flags of all options that ``calibrate`` can fit. The other options have no flag there.
        """
        task = CAPTION if self._spec is None else task_of(prompt, self._spec)
        fitted = self.maps.get(task)
        differing = () if fitted is None else _differing(options, fitted)
        needless = [name for name in differing if name not in FITTED_OPTIONS]
        wanted = {*decoding_options(options), *differing}
        flags = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in FITTED_OPTIONS if name in wanted]
        filled = self._spec.default if prompt is None and self._spec is not None else prompt
        other_prompt = fitted is None or (task == CAPTION and filled != fitted.prompt)
        if task == CAPTION and isinstance(prompt, str) and other_prompt:
            flags.insert(0, f"--prompt {shlex.quote(prompt)}")
        leave = f"leave {', '.join(map(option, needless))} out: calibrate has no flag for it" if needless else ""
        if leave and len(needless) == len(differing) and not other_prompt:
            return leave
        known = "captions" if task == CAPTION else "answers"
        command = " ".join(["blip2edge calibrate BUNDLE -o OUT --references FILE", *flags])
        return f"{leave}{'; ' if leave else ''}fit the confidence on pictures with known {known}: {command}"


def _differing(options: GenerationOptions, fitted: ConfidenceMap) -> list[str]:
    """Returns the sorted names of the options whose values differ from those with which a map was fitted."""
    given = decoding_options(options)
    return sorted(name for name in {**given, **fitted.options} if given.get(name) != fitted.options.get(name))
