"""Requests that can be cancelled and have a deadline, and their results."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from blip2edge.errors import Blip2EdgeError, DeadlineError, UsageError, option, shown
from blip2edge.runtime.captioning.encoder import STAGES
from blip2edge.runtime.decoding.generate import Generation
from blip2edge.runtime.decoding.generated import Likeliest
from blip2edge.runtime.decoding.options import GenerationOptions, check_integer, check_number
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import PromptText
from blip2edge.runtime.text.tokenizer import TextPieces, Tokenizer

NOT_IN_JSON = ("tokens_per_pass", "prompt_tokens", "new_tokens", "token_logprobs", "likeliest")
"""Attributes of a result that are left out of its JSON, or that are written in another way (``token_logprobs``)."""

DIGITS = 6
"""Number of decimals of log-probabilities in JSON."""

ABSTAINED = "abstained"
"""``finish_reason`` of a text whose confidence is below ``abstain_below``."""


@dataclass(frozen=True)
class CaptionResult:
    """The caption of a picture (or of several pictures in one prompt), with tokens and times.

    Attributes:
        image: The picture's path; None if the picture was given as an object. For several pictures, a list.
        prompt: The prompt as the user gave it; None if there was none.
        text: The caption, without special tokens and surrounding spaces.
        tokens: Generated token ids, the end token included.
        finish_reason: Why generation ended: ``eos`` (end token), ``length`` (limit) or ``stop`` (stop string); or
            ``abstained``: the confidence is below ``abstain_below``, and ``text`` is empty.
        timings_ms: Milliseconds of each stage in :data:`STAGES`, and their sum ``total``. The time of a batch is
            divided equally among its pictures. Encoding overlaps with decoding, so that many pictures take less wall
            time than the sum of their totals.
        tokens_per_s: Generated tokens, divided by the seconds of prefill and decode.
        tokens_per_pass: Generated tokens per pass of the language model; 1 without a draft model.
        prompt_tokens: Length of the prompt in tokens, visual tokens included.
        new_tokens: Number of generated tokens: ``tokens`` without the decoder's start token.
        token_logprobs: The log-probability of each generated token; see :class:`Generated`.
        confidence: Estimated probability that the text is right. ``calibrate --references`` fits the function that
            computes it; None if the bundle has no such function for these options and this prompt.
        likeliest: For each generated token, the likeliest tokens at its position; empty without ``top_logprobs``.
        queries: Number of visual tokens that the bridge made from each picture, or from each frame of a video; None for
            a model without a bridge.
    """

    image: str | list[str | None] | None
    prompt: str | None
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    timings_ms: dict[str, float]
    tokens_per_s: float
    tokens_per_pass: float = 1.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    token_logprobs: tuple[float, ...] = ()
    confidence: float | None = None
    likeliest: tuple[Likeliest, ...] = ()
    queries: int | None = None

    @property
    def logprob(self) -> float:
        """Returns the log-probability of the text (natural logarithm, not calibrated): the sum over its tokens."""
        return math.fsum(self.token_logprobs)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object: the attributes except :data:`NOT_IN_JSON`, and ``logprob`` before ``confidence``."""
        values = {key: value for key, value in vars(self).items() if key not in NOT_IN_JSON}
        last = {key: values.pop(key) for key in ("confidence", "queries")}
        last["token_logprobs"] = [round(value, DIGITS) for value in self.token_logprobs]
        return {**values, "tokens": list(self.tokens), "logprob": round(self.logprob, DIGITS), **last}


class TextAnswer(NamedTuple):
    """A generated text, why it ended, and its confidence; the fields mean the same as in :class:`CaptionResult`."""

    text: str
    finish_reason: str
    confidence: float | None


@dataclass(frozen=True)
class MatchResult:
    """How well a picture and a text match.

    Attributes:
        image: The picture's path; None if the picture was given as an object.
        text: The text as the user gave it.
        probability: Probability that the text describes the picture; None for a model without a matching head (CLIP).
        cosine: Cosine similarity of the picture's and the text's vectors, −1 to 1.
    """

    image: str | None
    text: str
    probability: float | None
    cosine: float

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object with the attributes as keys."""
        return dict(vars(self))


@dataclass(frozen=True)
class Span:
    """One run of a stage: its start and end in ``time.perf_counter`` seconds, and the numbers of the requests in it."""

    stage: str
    start: float
    end: float
    requests: tuple[int, ...]


LONGEST_DEADLINE = 1e6
"""Largest deadline in seconds (eleven days)."""


def expiry(deadline: float | None) -> float | None:
    """Returns when ``deadline`` seconds from now have passed (``time.monotonic`` seconds); None without deadline.

    Raises:
        UsageError: ``deadline`` is not above 0, or is above :data:`LONGEST_DEADLINE`.
    """
    if deadline is None:
        return None
    check_number("deadline", deadline, 0.0, LONGEST_DEADLINE, above=True)
    return time.monotonic() + deadline


Outcome = TypeVar("Outcome")


@dataclass(eq=False, kw_only=True)
class Pending(Generic[Outcome]):
    """Work that a user submitted. It can be cancelled, and it fails if it is not finished at its deadline.

    Attributes:
        expires: The deadline (``time.monotonic`` seconds); None for no deadline.
        future: Holds the result or the error.
        submitted: Time of the submission (``time.perf_counter`` seconds).
        queue_s: Seconds between the submission and the start of the work; None before the start.
    """

    expires: float | None = None
    future: Future[Outcome] = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)
    queue_s: float | None = None
    _finishing: threading.RLock = field(default_factory=threading.RLock)  # several threads may finish it at once

    def result(self, timeout: float | None = None) -> Outcome:
        """Waits for the result.

        Args:
            timeout: Seconds to wait; None for no limit.

        Raises:
            DeadlineError: The work was not finished within its deadline.
            ImageError, PromptError: As in the method of ``Captioner`` or ``Matcher`` that does the same work directly.
            concurrent.futures.CancelledError: The work was cancelled.
            TimeoutError: ``timeout`` has passed.
        """
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Cancels the work: it ends at the next step, and :meth:`result` raises CancelledError."""
        if self.future.cancel():
            self.push(None)

    @property
    def over(self) -> bool:
        """Returns whether the work is finished, failed or cancelled; it fails here if its deadline has passed."""
        if not self.future.done() and self.expires is not None and time.monotonic() > self.expires:
            self.fail(DeadlineError("the request was not finished before its deadline", "set a longer deadline"))
        return self.future.done()

    def push(self, piece: str | None) -> None:
        """Passes a piece of the result to the reader; None means the end. This class has no reader."""

    def finish(self, result: Outcome) -> None:
        """Sets the result, unless the work is finished or cancelled already."""
        with self._finishing:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                self.future.set_result(result)
        self.push(None)

    def fail(self, error: BaseException) -> None:
        """Sets ``error`` as the result, unless the work is finished or cancelled already."""
        with self._finishing:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
        self.push(None)


@dataclass(eq=False)
class Request(Pending[CaptionResult]):
    """A picture that was submitted to the scheduler by :meth:`Scheduler.submit`.

    Attributes:
        image, prompt, options: The arguments of ``submit``.
        number: Number of the request, counted in the order of submission.
        row: Number of the request's random stream: the same seed and number give the same random numbers.
        separate: Whether the request is encoded and decoded without other requests in its batch.
        prompt_tokens: Length of the prompt in tokens; 0 until the request is encoded.
        stage_ms: Milliseconds by stage so far.
        first_token_s: Seconds from submission to the first token (of a beam search: to the text); None before that.
        generation: The text while it is generated, a row of the batch; None before that, and for a beam search.
        on_piece: Called by the decoder's thread with each piece of the text, and with None at the end. If it is set,
            :meth:`pieces` yields nothing.
    """

    image: ItemSource
    prompt: PromptText | None
    options: GenerationOptions
    number: int
    row: int = 0
    separate: bool = False
    prompt_tokens: int = 0
    stage_ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    on_piece: Callable[[str | None], None] | None = None
    first_token_s: float | None = None
    generation: Generation | None = None
    _pieces: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    _text: TextPieces | None = None

    def begin(self, tokenizer: Tokenizer, row: Generation) -> None:
        """Prepares the request for decoding: ``row`` is its row of the batch, ``tokenizer`` converts its tokens."""
        self.generation = row
        if self.options.abstain_below is None:  # else the text is published at the end, if at all
            self._text = TextPieces(tokenizer, self.options.stop)

    def take(self, row: Generation) -> None:
        """Passes on the text of the newest token in ``row``, the request's row of the batch."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.submitted
        if self._text is None:
            return
        self.push(self._text.push(row.generated[-1]))
        if row.finish_reason is not None:
            self.push(self._text.flush())

    def outcome(self) -> CaptionResult | Blip2EdgeError:
        """Waits until the request is finished; returns its result or its error."""
        try:
            return self.result()
        except Blip2EdgeError as error:
            return error

    def pieces(self) -> Iterator[str]:
        """Yields the text piece by piece as it is generated; errors as in :meth:`result`.

        With beam search or ``abstain_below``, the whole text comes at the end.
        """
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.future.result()

    def push(self, piece: str | None) -> None:
        """Passes a piece of the text to ``on_piece``, or else to :meth:`pieces`; None means the end of the text."""
        if piece != "":
            (self.on_piece or self._pieces.put)(piece)

    def finish(self, result: CaptionResult) -> None:
        """Sets the result, unless the request is finished or cancelled already."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.submitted
        super().finish(result)


Item = TypeVar("Item")
Source = TypeVar("Source")


def listed(name: str, values: Iterable[Item]) -> list[Item]:
    """Returns pictures or texts as a list.

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
        UsageError: The value is not a str.
    """
    if not isinstance(value, str):
        raise UsageError(f"expected {option(name)} to be a text, got {shown(value)}", "pass a str")


def raising(results: Generator[Item | Blip2EdgeError, None, None]) -> Generator[Item, None, None]:
    """Yields the results up to the first error, and raises that error."""
    with closing(results):
        for result in results:
            if isinstance(result, Blip2EdgeError):
                raise result
            yield result


def in_batches(
    compute: Callable[[list[Source]], list[Item]], pictures: list[Source], batch_size: int
) -> Generator[Item | Blip2EdgeError, None, None]:
    """Yields the results of all pictures; if a batch fails, runs each of its pictures alone and yields result or error.

    Args:
        compute: Computes the results of one batch of pictures.
        pictures: The pictures.
        batch_size: Number of pictures in a batch.
    """
    for at in starts(len(pictures), batch_size):
        batch = pictures[at : at + batch_size]
        try:
            results = compute(batch)
        except Blip2EdgeError as error:
            if len(batch) == 1:
                yield error
            else:
                yield from in_batches(compute, batch, 1)
        else:
            yield from results


def starts(count: int, batch_size: int) -> range:
    """Returns the index of the first picture of each batch.

    Raises:
        UsageError: ``batch_size`` is below 1.
    """
    check_integer("batch_size", batch_size, 1)
    return range(0, count, batch_size)
