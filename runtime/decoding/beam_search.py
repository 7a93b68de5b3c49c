"""Beam search as in `GenerationMixin._beam_search` of transformers 5.23, picture by picture.

Each step considers the best max(2, 1 + number of end tokens) × num_beams continuations of the beams of a picture, so
that at least num_beams of the continuations are unfinished. A finished text may enter the result only if it is among
the first num_beams continuations. transformers runs a batch until all pictures are finished; here a picture leaves the
batch when it is finished, because its result does not change afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.decoding.generate import LOWEST, Stopped, finish_reason
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.logits_processors import LogitsProcessors
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.sampling import log_softmax, top_k_indices
from blip2edge.runtime.decoding.state import DecodeState

_Finished = tuple[tuple[int, ...], str, tuple[float, ...]]
"""Tokens of a finished text, why it ended, and the log-probability of each token."""

_EXCLUDED = np.float32(-1e9)  # added to a score that must not be chosen, as in transformers


def beam_search(
    first_logits: NDArray[np.float32],
    state: DecodeState,
    prompt_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    stopped: Stopped | None = None,
    initial: Sequence[int] = (),
    best: int = 1,
) -> list[Generated]:
    """Finds the best texts of every picture with `options.num_beams` beams.

    Args:
        first_logits: `[B, V]`, the logits after each prompt.
        state: The decoder's state after the prompts, B rows; the caller must not use it afterwards.
        prompt_ids: For each row, the token ids of its prompt.
        options: How to generate, the same for all rows.
        stopped: Returns whether a text with these generated ids contains a stop string; end tokens also end a text.
        initial: Ids that the decoder was started with (encoder-decoder models).
        best: Number of texts to return for each picture, at most `options.num_beams`.

    Returns:
        The `best` texts of the first picture, best first; then those of the second picture.

    Raises:
        BackendError: The decoder returned NaN.
    """
    width, vocabulary = options.num_beams, first_logits.shape[-1]
    active = [_BeamGroup(ids, initial, options, vocabulary, stopped) for ids in prompt_ids]
    pictures = list(active)
    logits = np.repeat(first_logits, width, axis=0)
    offsets = np.arange(len(active))  # the state's row of each picture's first beam
    spread = 0  # 0: all beams of a picture share one row of the state; 1: each beam has its own row
    while True:
        scores = log_softmax(np.asarray(logits, np.float32)).reshape(len(active), width, vocabulary)
        for picture, beams in zip(active, scores, strict=True):
            picture.advance(beams)
        going = [position for position, picture in enumerate(active) if not picture.done]
        if not going:
            return [text for picture in pictures for text in picture.results(initial, best)]
        rows = np.concatenate([offsets[at] + spread * active[at].sources for at in going])
        active = [active[at] for at in going]
        if len(rows) != state.batch_size or not np.array_equal(rows, np.arange(len(rows))):
            state.select(rows)
        logits = state.step(np.concatenate([picture.latest for picture in active]))
        offsets, spread = np.arange(len(active)) * width, 1


class _BeamGroup:
    """The running and the finished beams of one picture.

    Attributes:
        sources: int64 [num_beams], for each running beam the number of the beam that it continues.
        done: Whether the search has ended for this picture.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        initial: Sequence[int],
        options: GenerationOptions,
        vocabulary: int,
        stopped: Stopped | None,
    ) -> None:
        width = options.num_beams
        self._processors = LogitsProcessors([*prompt, *initial], options, vocabulary)
        self._options, self._stopped = options, stopped
        self._length = 0
        self._running = np.zeros((width, options.max_new_tokens), np.int64)
        self._scores = np.full(width, _EXCLUDED, np.float32)
        self._scores[0] = 0.0  # all beams are equal at first: only one of them counts
        # Of each token of the running beams, before the logits processors.
        self._logprobs = np.zeros((width, options.max_new_tokens), np.float32)
        self._finished: list[_Finished] = [((), "", ())] * width
        self._finished_scores = np.full(width, _EXCLUDED, np.float32)
        self._is_finished = np.zeros(width, bool)
        self._improvable = True
        self.sources: NDArray[np.int64] = np.zeros(width, np.int64)
        self.done = False

    @property
    def latest(self) -> NDArray[np.int64]:
        """Returns the last token of each running beam, int64 [num_beams]."""
        return self._running[:, self._length - 1]

    def advance(self, log_probs: NDArray[np.float32]) -> None:
        """Extends all running beams by one token.

        Args:
            log_probs: float32 [num_beams,V], log-probabilities of each beam's next token; changed in place.
        """
        plain = log_probs.copy()
        if self._processors.act(self._length):
            for beam, text in zip(log_probs, self._running, strict=True):
                self._processors(beam, text[: self._length])
        log_probs += self._scores[:, None]
        scores, sources, texts = self._continuations(log_probs)
        logprobs = self._logprobs[sources]
        logprobs[:, self._length] = plain[sources, texts[:, self._length]]
        length = self._length + 1
        reasons = [finish_reason(text, length, self._options, self._stopped) for text in texts[:, :length].tolist()]
        ended = np.array([reason is not None for reason in reasons])

        continued = scores + ended.astype(np.float32) * _EXCLUDED
        chosen = np.argsort(-continued, kind="stable")[: self._options.num_beams]
        self._collect(scores, texts[:, :length], reasons, ended, logprobs[:, :length])
        self._running, self._scores, self.sources = texts[chosen], continued[chosen], sources[chosen]
        self._logprobs = logprobs[chosen]
        self._length = length
        self._improvable = self._improvable and self._can_improve()
        full = self._options.early_stopping is True and bool(self._is_finished.all())
        self.done = full or not self._improvable or bool(ended.all())

    def results(self, initial: Sequence[int], count: int) -> list[Generated]:
        """Returns the `count` best finished texts, best first."""
        return [
            Generated((*initial, *tokens), reason, float(score), token_logprobs=logprobs)
            for score, (tokens, reason, logprobs) in zip(self._finished_scores, self._finished, strict=True)
        ][:count]

    def _continuations(
        self, log_probs: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Returns the K best continuations of the beams: scores [K], numbers of the continued beams [K], texts.

        The texts are token ids [K,max_new_tokens]; K is max(2, 1 + number of end tokens) × num_beams.
        """
        keep = max(2, 1 + len(self._options.eos_token_ids)) * self._options.num_beams
        flat = log_probs.reshape(-1)
        best = top_k_indices(flat, min(keep, len(flat)))
        sources, tokens = np.divmod(best, log_probs.shape[1])
        texts = self._running[sources]
        texts[:, self._length] = tokens
        return flat[best], sources, texts

    def _collect(
        self,
        scores: NDArray[np.float32],
        texts: NDArray[np.int64],
        reasons: Sequence[str | None],
        ended: NDArray[np.bool_],
        logprobs: NDArray[np.float32],
    ) -> None:
        """Adds the texts that just ended to the finished texts, and keeps the num_beams best by penalised score."""
        width = self._options.num_beams
        ripe = ended & (np.arange(len(ended)) < width)
        if not ripe.any():
            return
        with np.errstate(over="ignore"):  # the lowest float32, of `remove_invalid_values`
            penalised = scores / np.float32(texts.shape[1] ** self._options.length_penalty)
        entries = list(zip(self._finished_scores, self._finished, self._is_finished, strict=True))
        entries += [
            (penalised[at], (tuple(texts[at].tolist()), reasons[at] or "", _floored(logprobs[at])), np.True_)
            for at in np.flatnonzero(ripe).tolist()
        ]
        entries.sort(key=lambda entry: -entry[0])
        del entries[width:]
        self._finished_scores = np.array([score for score, _, _ in entries], np.float32)
        self._finished = [finished for _, finished, _ in entries]
        self._is_finished = np.array([flag for _, _, flag in entries])

    def _can_improve(self) -> bool:
        """Returns whether the best running beam may still get a better score than one of the finished texts.

        The score of the running beam is divided by the length penalty for its present length, or, with
        `early_stopping` "never", for the longest possible length.
        """
        penalty = self._options.length_penalty
        longest = self._options.early_stopping == "never" and penalty > 0
        length = self._options.max_new_tokens if longest else self._length
        best = self._scores[0] / np.float32(length**penalty)
        worst = np.where(self._is_finished, self._finished_scores.min(), _EXCLUDED)
        return bool((best > worst).any())


def _floored(logprobs: NDArray[np.float32]) -> tuple[float, ...]:
    """Returns the log-probabilities of a text's tokens, with :data:`LOWEST` in place of lower numbers."""
    return tuple(np.maximum(logprobs, np.float32(LOWEST)).tolist())
