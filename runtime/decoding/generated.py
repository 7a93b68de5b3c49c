"""The text that was generated for a row, with the log-probability of each token and word; when a text is finished."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.text.tokenizer import TextStream, Tokenizer

Stopped = Callable[[Sequence[int]], bool]

Likeliest = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place of a text, each with its log-probability, likeliest first."""


@dataclass(frozen=True)
class Generated:
    """The generated text of one row.

    Attributes:
        tokens: The ids that the decoder was started with, then the generated ids with the end token; no padding.
        finish_reason: "eos", "length" or "stop".
        score: The length-penalised log-probability of the best beam; None without beam search.
        tokens_per_pass: Number of generated tokens divided by the decoder's passes for them; 1 without a draft model.
        token_logprobs: Log-probability (natural logarithm) that the model gives each generated token: the log-softmax
            of the decoder's logits, before logits processors and temperature.
        likeliest: For each generated token, the likeliest tokens of its place; empty without
            ``GenerationOptions.top_logprobs``.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    score: float | None
    tokens_per_pass: float = 1.0
    # Not compared: their last digits depend on the batch, as those of the logits do.
    token_logprobs: tuple[float, ...] = field(default=(), compare=False)
    likeliest: tuple[Likeliest, ...] = field(default=(), compare=False)

    @property
    def logprob(self) -> float:
        """Log-probability of the text: the sum over its tokens."""
        return math.fsum(self.token_logprobs)


def finish_reason(
    generated: Sequence[int], length: int, options: GenerationOptions, stopped: Stopped | None
) -> str | None:
    """Returns why a text of `length` generated tokens is finished: "eos", "stop" or "length"; None if not finished."""
    if generated[-1] in options.eos_token_ids:
        return "eos"
    if stopped is not None and stopped(generated):
        return "stop"
    return "length" if length >= options.max_new_tokens else None


@dataclass(frozen=True)
class Word:
    """A word of a text, and the lowest log-probability of its tokens."""

    text: str
    logprob: float


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Returns the text that each token adds; joined, they are the text of all tokens.

    A character of several tokens belongs to the last of them. Special tokens have no text.
    """
    stream = TextStream(tokenizer)
    texts = [stream.push(token) for token in tokens]
    if texts:
        texts[-1] += stream.flush()
    return texts


def words(tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[float]) -> tuple[Word, ...]:
    """Returns the words of a text, which are separated by spaces; see :class:`Word`.

    Args:
        tokenizer: Decodes the tokens.
        tokens: The generated ids.
        logprobs: The log-probability of each.
    """
    found: list[Word] = []
    begins = True
    for text, logprob in zip(token_texts(tokenizer, tokens), logprobs, strict=True):
        for at, part in enumerate(text.split()):
            if at or begins or text[0].isspace():
                found.append(Word(part, logprob))
            else:
                found[-1] = Word(found[-1].text + part, min(found[-1].logprob, logprob))
        begins = text[-1].isspace() if text else begins
    return tuple(found)
