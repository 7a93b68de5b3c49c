"""Options and results of text generation, checks of arguments, and the test whether a text is finished."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2edge.bundle.schema import DRAFTS, DraftName
from blip2edge.errors import UsageError, option

MAX_BEAMS = 256
"""Largest number of beams: each has its own KV cache."""

MAX_TOKENS = 2**31 - 1
"""Largest number of tokens that an option may have, more than any context or vocabulary."""

MAX_SEED = 2**64 - 1

PENALTIES = (1e-3, 1e3)
"""Range of repetition penalties; outside it logits overflow float32."""

MAX_TEMPERATURE = 1e3
"""Largest temperature: with it, all tokens are almost equally likely."""

MAX_STOPS = 64
"""Largest number of stop texts, as each is searched for at every token."""

MIN_SAMPLING_TEMPERATURE = 1e-5
"""Temperatures below this are greedy decoding: in float32, the likeliest token then has the probability 1."""

_SAMPLING = f"{option('temperature')}, {option('top_p')} or {option('top_k')}"

Item = TypeVar("Item")
Stopped = Callable[[Sequence[int]], bool]


class CaptionOptions(TypedDict, total=False):
    """The keywords of ``Captioner.caption(**options)``: fields of :class:`GenerationOptions`, each may be left out."""

    max_new_tokens: int
    min_new_tokens: int
    num_beams: int
    length_penalty: float
    repetition_penalty: float
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    early_stopping: bool
    eos_token_ids: tuple[int, ...] | list[int]
    stop: tuple[str, ...] | list[str]
    draft: DraftName


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate a text. Tokens are sampled if a temperature, top_p or top_k is given (temperature 0: not).

    Attributes:
        max_new_tokens: Largest number of generated tokens, the end token included.
        min_new_tokens: Number of tokens before which no end token is generated.
        num_beams: Width of beam search; 1 for greedy decoding or sampling.
        length_penalty: Beam scores are divided by ``length ** length_penalty``.
        repetition_penalty: Above 1, tokens of the prompt and of the text so far become less likely.
        temperature: Divides the logits before sampling.
        top_p: Sample from the smallest set of likeliest tokens whose probabilities sum to at least this.
        top_k: Sample from this number of likeliest tokens; 0 for all.
        seed: Seed of the random streams, one stream for each row; None for a different text at every call.
        early_stopping: Whether beam search ends as soon as num_beams texts are finished.
        eos_token_ids: End tokens: each of them finishes a text.
        stop: Strings that end the text: it is cut before the first of them.
        draft: Draft model of speculative decoding, one of ``schema.DRAFTS``. The text does not depend on it. Sampling
            and beam search use none.

    Raises:
        UsageError: A value is outside its range, or two contradict each other.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    early_stopping: bool = False
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    draft: DraftName = "auto"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_new_tokens", 1, MAX_TOKENS),
            ("min_new_tokens", 0, MAX_TOKENS),
            ("num_beams", 1, MAX_BEAMS),
        ):
            check_integer(name, getattr(self, name), least, most)
        for name, most in (("top_k", MAX_TOKENS), ("seed", MAX_SEED)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, most)
        check_number("length_penalty", self.length_penalty, -10.0, 10.0)
        check_number("repetition_penalty", self.repetition_penalty, *PENALTIES)
        if self.temperature is not None:
            check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0)
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"expected {option('min_new_tokens')} of at most {self.max_new_tokens}, got {self.min_new_tokens}",
                f"raise {option('max_new_tokens')}",
            )
        ends: Any = self.eos_token_ids
        if isinstance(ends, (int, str)):
            raise UsageError(f"expected {option('eos_token_ids')} to be a list of ids, got {ends!r}")
        for token_id in self.eos_token_ids:
            check_integer("eos_token_ids", token_id, 0, MAX_TOKENS)
        _check_texts("stop", self.stop)
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.draft not in DRAFTS:
            raise UsageError(f"expected {option('draft')} to be one of {', '.join(DRAFTS)}, got {self.draft!r}")
        if self.num_beams > 1 and self.draft not in ("auto", "none"):
            raise UsageError(
                f"expected {option('num_beams')} 1 with {option('draft')} {self.draft}, got {self.num_beams}",
                f"beam search does not use a draft model: leave {option('num_beams')} or {option('draft')} out",
            )
        if self.sampling and self.draft not in ("auto", "none"):
            raise UsageError(
                f"expected {option('draft')} auto or none with {_SAMPLING}, got {self.draft}",
                "verifying several tokens in one pass rounds differently, which may change the sampled tokens: "
                f"set {option('draft')} to none, or leave the sampling options out",
            )
        if self.num_beams > 1 and self.sampling:
            raise UsageError(
                f"expected either {option('num_beams')} or sampling, got {self.num_beams} beams and {_SAMPLING}",
                f"leave {option('num_beams')} or the sampling options out",
            )

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn at random."""
        given = self.temperature is not None or self.top_p is not None or self.top_k is not None
        return given and (self.temperature is None or self.temperature >= MIN_SAMPLING_TEMPERATURE)


def check_integer(name: str, value: Any, least: int, most: int = MAX_TOKENS) -> None:
    """Raises UsageError unless a value is a whole number from ``least`` to ``most``."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise UsageError(f"expected {option(name)} to be a whole number of at least {least}, got {shown(value)}")
    if value > most:
        raise UsageError(f"expected {option(name)} of at most {most}, got {shown(value)}")


def _check_texts(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) and text for text in value):
        fix = f"put the text in a list: [{shown(value)}]" if isinstance(value, str) and value else None
        raise UsageError(f"expected {option(name)} to be a list of non-empty texts, got {shown(value)}", fix)
    if len(value) > MAX_STOPS:
        raise UsageError(f"expected {option(name)} to be a list of at most {MAX_STOPS} texts, got {len(value)}")


def check_number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raises UsageError unless a value is a number from ``low`` to ``high``; ``above`` excludes ``low`` itself."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if real and low <= value <= high and not (above and value == low):  # NaN is in no range
        return
    expected = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    raise UsageError(f"expected {option(name)} to be {expected}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as text for an error message, at most 80 characters."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python itself refuses to write very long ones
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Generated:
    """The generated text of one row.

    Attributes:
        tokens: The ids that the decoder was started with, then the generated ids with the end token; no padding.
        finish_reason: "eos", "length" or "stop".
        score: The length-penalised log-probability of the best beam; None without beam search.
        tokens_per_pass: Number of generated tokens divided by the decoder's passes for them; 1 without a draft model.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    score: float | None
    tokens_per_pass: float = 1.0


def ids_before(prompt: Sequence[int], initial: Sequence[int], vocabulary: int) -> NDArray[np.int64]:
    """The ids before the generated ones, each once, that the repetition penalty applies to: those below V."""
    ids = np.unique(np.array([*prompt, *initial], np.int64))
    return ids[(ids >= 0) & (ids < vocabulary)]


def end_ids(options: GenerationOptions, vocabulary: int) -> NDArray[np.int64]:
    """The end tokens that the model can generate, int64."""
    return np.array([token for token in options.eos_token_ids if token < vocabulary], np.int64)


def finish_reason(
    generated: Sequence[int], length: int, options: GenerationOptions, stopped: Stopped | None
) -> str | None:
    """Why a text of `length` generated tokens is finished: "eos", "stop" or "length"; None if it is not finished."""
    if generated[-1] in options.eos_token_ids:
        return "eos"
    if stopped is not None and stopped(generated):
        return "stop"
    return "length" if length >= options.max_new_tokens else None


def listed(name: str, values: Iterable[Item]) -> list[Item]:
    """Pictures or texts as a list.

    Args:
        name: The argument's name, for the error.
        values: The value that the user passed.

    Raises:
        UsageError: The value is a single picture or text, or not iterable.
    """
    one = isinstance(values, (str, bytes, os.PathLike, Image.Image)) or not isinstance(values, Iterable)
    if isinstance(values, np.ndarray):  # a batch of pictures is [N, H, W] or [N, H, W, 3]
        one = values.ndim < 3 or (values.ndim == 3 and values.shape[-1] in (1, 3, 4))
    if one:
        what = f"an array {list(values.shape)}" if isinstance(values, np.ndarray) else shown(values)
        raise UsageError(f"expected {option(name)} to be a list, got {what}", "put a single value in a list: [x]")
    return list(values)


def check_text(name: str, value: object) -> None:
    """Checks that a prompt, a question or a text is a str.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(value, str):
        raise UsageError(f"expected {option(name)} to be a text, got {shown(value)}")
