"""Options of text generation, and the checks of their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, TypedDict

import numpy as np

from blip2edge.bundle.schema import DRAFTS, DraftName
from blip2edge.errors import UsageError, option, shown

MAX_BEAMS = 256
"""Largest number of beams; it limits the memory, because each beam has its own KV cache."""

MAX_TOKENS = 2**31 - 1
"""Largest value of an option that counts tokens or is a token id; more than any context or vocabulary."""

MAX_SEED = 2**64 - 1

PENALTIES = (1e-3, 1e3)
"""Smallest and largest repetition penalty; others could make logits overflow float32."""

MAX_TEMPERATURE = 1e3
"""Largest temperature, at which all tokens are almost equally likely."""

MAX_STOPS = 64
"""Largest number of stop texts, because the text is searched for each stop text at every token."""

MIN_SAMPLING_TEMPERATURE = 1e-5
"""Below this temperature, decoding is greedy: in float32, the likeliest token has the probability 1."""

MAX_BIAS = 1e6
"""Largest bias of a sequence; a bias of minus infinity excludes the sequence."""

BELOW_ONE = 1 - 1e-6
"""Largest value of ``epsilon_cutoff`` and ``eta_cutoff``, which must be below 1."""

MAX_TOP_LOGPROBS = 20
"""Largest value of ``top_logprobs``, as in OpenAI's chat format."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Options that have an effect only in sampling."""

PROCESSED = (
    "sequence_bias", "encoder_repetition_penalty", "repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "renormalize_logits",
)  # fmt: skip
"""Options that change the scores of the next token (`logits_processors.py`), in the order in which they act."""

_SAMPLING = f"{option('temperature')}, {option('top_p')} or {option('top_k')}"


class CaptionOptions(TypedDict, total=False):
    """The keyword options of ``Captioner.caption``: fields of :class:`GenerationOptions`, all optional."""

    max_new_tokens: int
    min_new_tokens: int
    num_beams: int
    length_penalty: float
    repetition_penalty: float
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    early_stopping: bool | Literal["never"]
    eos_token_ids: tuple[int, ...] | list[int]
    stop: tuple[str, ...] | list[str]
    draft: DraftName
    min_length: int | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    encoder_repetition_penalty: float | None
    bad_words_ids: Sequence[Sequence[int]] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Sequence[Any]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    exponential_decay_length_penalty: Sequence[float] | None
    remove_invalid_values: bool | None
    renormalize_logits: bool | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    top_logprobs: int
    abstain_below: float | None
    queries: int | None


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate a text. Tokens are sampled if an option of :data:`SAMPLING` is set, except with temperature 0.

    From ``min_length`` on, the names, values and effects are those of transformers' `GenerationConfig`, and None means
    off; `logits_processors` has the formulas. Lists and mappings are stored as tuples.

    Attributes:
        max_new_tokens: Largest number of generated tokens, the end token included.
        min_new_tokens: Smallest number of generated tokens; no end token is generated before.
        num_beams: Width of beam search; 1 for greedy decoding or sampling.
        length_penalty: Beam scores are divided by ``length ** length_penalty``.
        repetition_penalty: Above 1, tokens of the prompt and of the text so far become less likely.
        temperature: Divides the logits before sampling.
        top_p: Sample from the smallest set of likeliest tokens whose probabilities sum to at least this.
        top_k: Sample from this number of likeliest tokens; 0 for all.
        seed: Seed of the random streams, one stream for each row; None for a different text at every call.
        early_stopping: True: beam search ends as soon as num_beams texts are finished. False: as soon as the best
            running text, at its present length, is worse than these texts; "never": at any length.
        eos_token_ids: Ids of the end tokens. A text is finished after any of them.
        stop: Strings that end the text: it is cut before the first of them.
        draft: Draft model of speculative decoding, one of ``schema.DRAFTS``. The text does not depend on it. Sampling
            and beam search use none.
        min_length: No end token before this many tokens, the prompt's included. `min_new_tokens` replaces it.
        no_repeat_ngram_size: No n-gram of this size occurs twice in prompt and text; 0: off.
        encoder_no_repeat_ngram_size: No n-gram of this size in the prompt occurs in the text; 0: off.
        encoder_repetition_penalty: Above 1 encourages tokens of the prompt.
        bad_words_ids: Sequences of ids that are never generated.
        sequence_bias: For each sequence of ids, a number that is added to the score of its last token, if all its other
            tokens come just before. A mapping, or a list of pairs (JSON).
        suppress_tokens: Ids that are never generated.
        begin_suppress_tokens: Ids that are not generated as the first token of the text.
        forced_bos_token_id: The first generated id, if the text starts from a single id.
        forced_eos_token_id: If a text reaches `max_new_tokens`, its last id is the likeliest of these ids.
        exponential_decay_length_penalty: (start, factor): from `start` generated tokens on, the end tokens' scores
            grow by |score| (factor ** (tokens - start) - 1).
        remove_invalid_values: NaN and infinite scores become finite.
        renormalize_logits: Scores become log-probabilities after all other processors.
        min_p: Sample from tokens whose probability is at least this share of the likeliest token's probability.
        typical_p: Sample from the most typical tokens whose probabilities reach this sum; 1: from all.
        epsilon_cutoff: Sample from tokens of at least this probability.
        eta_cutoff: As `epsilon_cutoff`, but the limit is lower if the entropy of the distribution is large.
        top_logprobs: Number of likeliest tokens whose log-probabilities the result has at each token, at most
            :data:`MAX_TOP_LOGPROBS`; not with beam search.
        abstain_below: A text whose confidence is lower is replaced by an empty text (docs/confidence.md); 0: never.
        queries: For an elastic bundle, the number of visual tokens of each picture (from the bridge's first queries);
            None for all.

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
    early_stopping: bool | Literal["never"] = False
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    draft: DraftName = "auto"
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    encoder_repetition_penalty: float = 1.0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    top_logprobs: int = 0
    abstain_below: float | None = None
    queries: int | None = None

    def __post_init__(self) -> None:
        for name, checked in _CHECKED.items():
            value = getattr(self, name)
            off = value is None and (name in _NONE_IS_OFF or _DEFAULTS[name] is None)
            object.__setattr__(self, name, _DEFAULTS[name] if off else checked(name, value))
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"expected {option('min_new_tokens')} of at most {self.max_new_tokens}, got {self.min_new_tokens}",
                f"raise {option('max_new_tokens')}",
            )
        self._check_mode()

    def _check_mode(self) -> None:
        """Raises UsageError if beam search, sampling and the draft model contradict each other."""
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
        if self.num_beams > 1 and self.top_logprobs:
            raise UsageError(
                f"expected top_logprobs 0 with {option('num_beams')} {self.num_beams}, got {self.top_logprobs}",
                f"leave {option('num_beams')} or top_logprobs out",
                field="top_logprobs",
            )

    def check_stream(self) -> None:
        """Raises UsageError if the options contain beam search or ``abstain_below``, whose text cannot be streamed."""
        check_stream(self.num_beams, self.abstain_below)

    @property
    def processed(self) -> tuple[str, ...]:
        """Returns the names of the options in :data:`PROCESSED` that are set."""
        return tuple(name for name in PROCESSED if getattr(self, name) != _DEFAULTS[name])

    @property
    def sampling(self) -> bool:
        """Returns whether tokens are drawn at random."""
        return _samples(vars(self))


def check_stream(num_beams: int | None, abstain_below: float | None) -> None:
    """Raises UsageError for options that choose the text only at its end: such a text cannot be streamed."""
    for name, above, used, why in (
        ("num_beams", " above 1", (num_beams or 1) > 1, "beam search chooses the words at the end"),
        ("abstain_below", "", abstain_below is not None, "the confidence is known at the end"),
    ):
        if used:
            raise UsageError(
                f"{option('stream')} and {option(name)}{above} cannot be combined: {why}",
                f"leave {option('stream')} or {option(name)} out",
            )


def _samples(values: Mapping[str, Any]) -> bool:
    """Returns whether the options select sampling; the values may be unchecked and of any type."""
    temperature = values.get("temperature")
    greedy = isinstance(temperature, (int, float, np.number)) and temperature < MIN_SAMPLING_TEMPERATURE
    return not greedy and any(values.get(name) is not None for name in SAMPLING)


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a bundle's default options, with the options of the caller in place of the defaults.

    If the caller selects sampling, beam search in the defaults is switched off, and the other way round. If a length
    limit in the defaults contradicts a length limit of the caller, the limit in the defaults is adjusted.

    Args:
        defaults: The manifest's `generation`; keys that are no options are ignored.
        given: Fields of :class:`GenerationOptions`, not checked.

    Returns:
        Fields of :class:`GenerationOptions`.
    """
    base = {name: value for name, value in defaults.items() if name in _DEFAULTS and value is not None}
    if _samples(given):
        base.pop("num_beams", None)
    elif given.get("num_beams", 1) != 1:
        base = {name: value for name, value in base.items() if name not in SAMPLING}
    least, most = given.get("min_new_tokens"), given.get("max_new_tokens")
    if isinstance(most, (int, np.integer)):
        base["min_new_tokens"] = min(base.get("min_new_tokens", 0), most)
    if isinstance(least, (int, np.integer)):
        base["max_new_tokens"] = max(base["max_new_tokens"], least)
        base.pop("min_length", None)
    return {**base, **given}


def check_integer(name: str, value: Any, least: int, most: int = MAX_TOKENS) -> Any:
    """Returns the value; raises UsageError unless the value is a whole number from ``least`` to ``most``."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise UsageError(f"expected {option(name)} to be a whole number of at least {least}, got {shown(value)}")
    if value > most:
        raise UsageError(f"expected {option(name)} of at most {most}, got {shown(value)}")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) and text for text in value):
        fix = f"put the text in a list: [{shown(value)}]" if isinstance(value, str) and value else None
        raise UsageError(f"expected {option(name)} to be a list of non-empty texts, got {shown(value)}", fix)
    if len(value) > MAX_STOPS:
        raise UsageError(f"expected {option(name)} to be a list of at most {MAX_STOPS} texts, got {len(value)}")
    return tuple(value)


def check_number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> Any:
    """Returns the value; raises UsageError unless it is from ``low`` to ``high`` (``above``: excluding ``low``)."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if real and low <= value <= high and not (above and value == low):  # NaN is in no range
        return value
    expected = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    raise UsageError(f"expected {option(name)} to be {expected}, got {shown(value)}")


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"expected {option(name)} to be a list of ids, got {shown(value)}")
    return tuple(int(check_integer(name, token_id, 0)) for token_id in value)


def _id_or_ids(name: str, value: Any) -> tuple[int, ...]:
    return _ids(name, [value] if isinstance(value, (int, np.integer)) else value)


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UsageError(f"expected {option(name)} to be a list of lists of ids, got {shown(value)}")
    sequences = tuple(_ids(name, ids) for ids in value)
    if not all(sequences):
        raise UsageError(f"expected {option(name)} to be a list of non-empty lists of ids, got an empty one")
    return sequences


def _biases(name: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    whole = isinstance(pairs, Sequence) and not isinstance(pairs, str)
    if not whole or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise UsageError(f"expected {option(name)} to be a list of pairs of ids and a number, got {shown(value)}")
    sequences = _sequences(name, [ids for ids, _ in pairs])
    biases = [float(check_number(name, bias, -math.inf, MAX_BIAS)) for _, bias in pairs]
    return tuple(dict(zip(sequences, biases, strict=True)).items())  # of equal sequences the last one counts


def _decay(name: str, value: Any) -> tuple[int, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UsageError(f"expected {option(name)} to be a start and a factor, got {shown(value)}")
    return check_integer(name, value[0], 0), check_number(name, value[1], 0.0, PENALTIES[1], above=True)


def _switch(name: str, value: Any, expected: str = "true or false") -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise UsageError(f"expected {option(name)} to be {expected}, got {shown(value)}")
    return bool(value)


def _early_stopping(name: str, value: Any) -> bool | Literal["never"]:
    if isinstance(value, str) and value == "never":
        return "never"
    return _switch(name, value, 'true, false or "never"')


_DEFAULTS = {field.name: field.default for field in fields(GenerationOptions)}

_CHECKED: Mapping[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": partial(check_integer, least=1),
    "min_new_tokens": partial(check_integer, least=0),
    "num_beams": partial(check_integer, least=1, most=MAX_BEAMS),
    "top_k": partial(check_integer, least=0),
    "seed": partial(check_integer, least=0, most=MAX_SEED),
    "length_penalty": partial(check_number, low=-10.0, high=10.0),
    "repetition_penalty": partial(check_number, low=PENALTIES[0], high=PENALTIES[1]),
    "temperature": partial(check_number, low=0.0, high=MAX_TEMPERATURE),
    "top_p": partial(check_number, low=0.0, high=1.0),
    "early_stopping": _early_stopping,
    "eos_token_ids": _ids,
    "stop": _texts,
    "min_length": partial(check_integer, least=0),
    "no_repeat_ngram_size": partial(check_integer, least=0),
    "encoder_no_repeat_ngram_size": partial(check_integer, least=0),
    "encoder_repetition_penalty": partial(check_number, low=PENALTIES[0], high=PENALTIES[1]),
    "bad_words_ids": _sequences,
    "sequence_bias": _biases,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "forced_bos_token_id": partial(check_integer, least=0),
    "forced_eos_token_id": _id_or_ids,
    "exponential_decay_length_penalty": _decay,
    "remove_invalid_values": _switch,
    "renormalize_logits": _switch,
    "min_p": partial(check_number, low=0.0, high=1.0),
    "typical_p": partial(check_number, low=0.0, high=1.0, above=True),
    "epsilon_cutoff": partial(check_number, low=0.0, high=BELOW_ONE),
    "eta_cutoff": partial(check_number, low=0.0, high=BELOW_ONE),
    "top_logprobs": partial(check_integer, least=0, most=MAX_TOP_LOGPROBS),
    "abstain_below": partial(check_number, low=0.0, high=1.0),
    "queries": partial(check_integer, least=1),
}
"""For each field of the options, the function that checks a value and returns the value to store."""

_NONE_IS_OFF = tuple(_CHECKED)[tuple(_CHECKED).index("min_length") :]
