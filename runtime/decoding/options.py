"""Options and results of text generation, and when a text is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.schema import DRAFTS
from blip2edge.errors import UsageError

MAX_BEAMS = 256
"""Every beam has its own KV cache."""

MAX_TOKENS = 2**31 - 1
"""Bound of counts of tokens: more than any context or vocabulary has."""

MAX_SEED = 2**64 - 1

PENALTIES = (1e-3, 1e3)
"""Range of repetition penalties; outside it logits overflow float32."""

MAX_TEMPERATURE = 1e3
"""Largest temperature; it samples almost uniformly."""

MAX_STOPS = 64
"""Largest number of stop texts, as each is searched for at every token."""

MIN_SAMPLING_TEMPERATURE = 1e-5
"""Temperatures below this are greedy: in float32 the likeliest token has all of the probability."""

Stopped = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. Sampling is on as soon as a temperature, top_p or top_k is given (temperature 0: off).

    Attributes:
        max_new_tokens: At most this many tokens, the end token included.
        min_new_tokens: No end token before this many.
        num_beams: 1, or the width of beam search.
        length_penalty: Beam scores are divided by length ** length_penalty.
        repetition_penalty: Above 1 discourages tokens of the prompt and of the text so far.
        temperature: Divides the logits before sampling.
        top_p: Sample from the fewest tokens whose probabilities reach this sum.
        top_k: Sample from this many tokens; 0: from all.
        seed: Of the random streams, one per row; None for a different text every time.
        early_stopping: Beam search ends as soon as num_beams texts are finished.
        eos_token_ids: Each of these finishes a text.
        stop: Strings that finish a text; the caller searches for them and passes `stopped`.
        draft: Draft model of speculative decoding, one of `schema.DRAFTS`. The text does not depend on it; sampling
            uses none.

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
    draft: str = "auto"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_new_tokens", 1, MAX_TOKENS),
            ("min_new_tokens", 0, MAX_TOKENS),
            ("num_beams", 1, MAX_BEAMS),
        ):
            _check_integer(name, getattr(self, name), least, most)
        for name, most in (("top_k", MAX_TOKENS), ("seed", MAX_SEED)):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 0, most)
        check_number("length_penalty", self.length_penalty, -10.0, 10.0)
        check_number("repetition_penalty", self.repetition_penalty, *PENALTIES)
        if self.temperature is not None:
            check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0)
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"expected --min-new-tokens of at most {self.max_new_tokens}, got {self.min_new_tokens}",
                "raise --max-new-tokens",
            )
        ends: Any = self.eos_token_ids
        if isinstance(ends, (int, str)):
            raise UsageError(f"expected eos_token_ids to be a list of ids, got {ends!r}")
        for token_id in self.eos_token_ids:
            _check_integer("eos_token_ids", token_id, 0, MAX_TOKENS)
        _check_texts("stop", self.stop)
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.draft not in DRAFTS:
            raise UsageError(f"expected --draft to be one of {', '.join(DRAFTS)}, got {self.draft!r}")
        if self.num_beams > 1 and self.draft not in ("auto", "none"):
            raise UsageError(
                f"expected --num-beams 1 with --draft {self.draft}, got {self.num_beams}",
                "beams read no text ahead: leave one of them out",
            )
        if self.sampling and self.draft not in ("auto", "none"):
            raise UsageError(
                f"expected --draft auto or none with a temperature, --top-p or --top-k, got {self.draft}",
                "a pass over several tokens rounds otherwise, and may change what is drawn: leave one of them out",
            )
        if self.num_beams > 1 and self.sampling:
            raise UsageError(
                f"expected either --num-beams or sampling, got {self.num_beams} beams and a temperature, "
                "--top-p or --top-k",
                "leave one of them out",
            )

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn at random."""
        given = self.temperature is not None or self.top_p is not None or self.top_k is not None
        return given and (self.temperature is None or self.temperature >= MIN_SAMPLING_TEMPERATURE)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise UsageError(
            f"expected {_flag(name)} to be a whole number of at least {least}, got {_told(value)}"
        )
    if value > most:
        raise UsageError(f"expected {_flag(name)} of at most {most}, got {_told(value)}")


def _check_texts(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) and text for text in value):
        raise UsageError(f"expected {_flag(name)} to be texts that are not empty, got {_told(value)}")
    if len(value) > MAX_STOPS:
        raise UsageError(f"expected {_flag(name)} to be at most {MAX_STOPS} texts, got {len(value)}")


def check_number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raises UsageError unless a value is a number from ``low`` to ``high``; ``above`` excludes ``low`` itself."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if real and low <= value <= high and not (above and value == low):  # NaN is in no range
        return
    expected = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    raise UsageError(f"expected {_flag(name)} to be {expected}, got {_told(value)}")


def _told(value: Any) -> str:
    """A value for a message of one line, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python itself refuses to write very long ones
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Generated:
    """One row's outcome.

    Attributes:
        tokens: The generated ids, the end token included, without padding; preceded by `initial`.
        finish_reason: "eos", "length" or "stop".
        score: The length-penalised log-probability of the best beam; None without beam search.
        tokens_per_pass: Generated tokens over the passes of the decoder that they took; 1 without a draft model.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    score: float | None
    tokens_per_pass: float = 1.0


@dataclass(frozen=True)
class StepEvent:
    """One new token of one row; `finish_reason` is set on the row's last one."""

    row: int
    token: int
    finish_reason: str | None


def end_ids(options: GenerationOptions, vocabulary: int) -> NDArray[np.int64]:
    """The end tokens that the model can generate, int64."""
    return np.array([token for token in options.eos_token_ids if token < vocabulary], np.int64)


def finish_reason(
    generated: Sequence[int], length: int, options: GenerationOptions, stopped: Stopped | None
) -> str | None:
    """Why a text of `length` generated tokens is finished: "eos", "stop", "length"; None where it is not."""
    if generated[-1] in options.eos_token_ids:
        return "eos"
    if stopped is not None and stopped(generated):
        return "stop"
    return "length" if length >= options.max_new_tokens else None
