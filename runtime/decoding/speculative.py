"""Speculative decoding: a draft model proposes tokens, and one pass of the language model verifies them all.

The language model processes its last token and the proposed tokens in one pass, which gives logits after each token.
Proposed tokens are accepted as long as they equal the tokens that these logits choose. The first token that differs and
all tokens after it are removed from the KV cache (Leviathan et al., arXiv 2211.17192, with arg-max acceptance). Every
token is chosen from the language model's own logits, so the text is the same as in plain decoding.

Each row has its own draft model. If several rows are decoded at once, they are decoded without draft models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.decoding.state import RowState

MAX_DRAFT_TOKENS = 15
"""Largest number of proposed tokens in one pass: exported decoders return the logits of at most 16 tokens."""

TIE_MARGIN = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Tie margins by the decoder's precision, as a share of the largest absolute logit. A pass over several tokens rounds
differently than a pass over one token, which could swap two nearly equal scores. So if the two best scores after a pass
over several tokens differ by less than the margin, the logits are computed again by a pass over one token, as in plain
decoding."""

TIE_MARGIN_QUANTIZED = 3e-2
"""The value of :data:`TIE_MARGIN` for INT8 and INT4 decoders."""


class DraftModel(Protocol):
    """Proposes the next tokens of one text; the language model (the target model) then verifies them."""

    def propose(self, generated: Sequence[int], most: int) -> list[int]:
        """Proposes the tokens that follow the generated tokens.

        Args:
            generated: Token ids that the language model generated so far, at least one.
            most: The largest number of tokens to propose.

        Returns:
            Ids of the language model; empty if there is no proposal.
        """
        ...


class SpeculationCost:
    """Decides for each step whether to decode with a draft model, from the times of earlier steps.

    The seconds per token of speculative decoding (draft model and verification) are compared with the seconds of a
    plain step. If speculative decoding is slower, the next steps are plain (a pause); then it is tried again. Each time
    it is slower again, the next pause is longer. One object serves all texts of a captioner.

    Args:
        clock: Returns the time in seconds.
    """

    LEARN = 3  # plain steps that are timed before the first speculation
    AGAIN = 64  # passes with speculation after which one plain step is timed again
    TRIAL = 4  # passes with speculation before it may be stopped
    FADE = 0.9  # factor on the sums of earlier passes at each new pass: recent passes count more
    SHORTEST_PAUSE, LONGEST_PAUSE = 128, 8192  # plain steps; a pause is four times as long as the last one

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.plain_seconds = 0.0
        self._steps = 0
        self._passes = 0  # since the last pause
        self._since_plain = 0
        self._seconds = self._tokens = 0.0
        self._accepted = float(MAX_DRAFT_TOKENS)
        self._pause = 0
        self._next_pause = self.SHORTEST_PAUSE

    @property
    def pays(self) -> bool:
        """Returns whether the next step should use speculative decoding."""
        return self._steps >= self.LEARN and self._pause == 0 and self._since_plain < self.AGAIN

    @property
    def seconds_per_token(self) -> float:
        """Returns the seconds per token of recent speculative steps, draft model included; infinite without tokens."""
        return self._seconds / self._tokens if self._tokens else math.inf

    @property
    def width(self) -> int:
        """Returns how many tokens to propose: 1.5 times the mean number of accepted tokens in recent passes, plus 1."""
        return min(MAX_DRAFT_TOKENS, math.ceil(1.5 * self._accepted) + 1)

    def plain_step(self, seconds: float) -> None:
        """Records the time of a plain decode step, in seconds."""
        # The first runs of a session are slow, so that the quickest of them counts. Later steps enter an average.
        learning = self._steps < self.LEARN
        quickest = min(self.plain_seconds or seconds, seconds)
        self.plain_seconds = quickest if learning else 0.8 * self.plain_seconds + 0.2 * seconds
        self._steps += 1
        self._since_plain = 0
        if self._pause:
            self._pause -= 1

    def speculative_pass(self, seconds: float) -> None:
        """Records the seconds of proposing and verifying tokens, or only of proposing if nothing was proposed."""
        self._seconds = self.FADE * self._seconds + seconds
        self._tokens *= self.FADE
        self._passes += 1
        self._since_plain += 1
        if self._passes > self.TRIAL and self.seconds_per_token > self.plain_seconds:
            self._pause, self._next_pause = self._next_pause, min(4 * self._next_pause, self.LONGEST_PAUSE)
            self._passes, self._seconds, self._tokens = 0, 0.0, 0.0
        elif self._passes > 4 * self.TRIAL:
            self._next_pause = self.SHORTEST_PAUSE

    def token(self) -> None:
        """Records a token that was chosen from the logits of a verifying pass."""
        self._tokens += 1

    def accepted(self, count: int) -> None:
        """Records how many proposed tokens of a pass were accepted."""
        self._accepted = 0.7 * self._accepted + 0.3 * count


class Speculator:
    """Decodes one text speculatively: verifies proposed tokens with the language model, and counts them.

    Args:
        draft: The draft model of this text.
        cost: Decides at each step whether to speculate; shared by all texts.
        tie_margin: See :data:`TIE_MARGIN`.
        most: Largest number of tokens that are proposed at once.

    Attributes:
        drafted: Number of tokens that were proposed so far.
        accepted: Number of proposed tokens that were accepted so far.
    """

    def __init__(
        self,
        draft: DraftModel,
        cost: SpeculationCost,
        tie_margin: float = TIE_MARGIN["fp32"],
        most: int = MAX_DRAFT_TOKENS,
    ) -> None:
        self._draft = draft
        self._cost = cost
        self._tie_margin = tie_margin
        self._most = most
        self._proposed: list[int] = []  # in the last pass
        self._place = 0  # how many of them are accepted
        self._seconds = 0.0  # of the proposal
        self._logits = np.empty((0, 0), np.float32)  # [proposed + 1, V]
        self.drafted = self.accepted = 0

    def step(
        self,
        state: RowState,
        generated: Sequence[int],
        remaining: int,
        scores: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    ) -> tuple[NDArray[np.float32], int]:
        """Computes the logits after the last token of a text, with speculation if it is faster.

        Args:
            state: The decoder's state; one row.
            generated: The generated ids so far; the last one was chosen from the logits of the previous step.
            remaining: Number of tokens that may still be generated.
            scores: Applies the logits processors to logits ``[V]``.

        Returns:
            Logits ``[1, V]``, and the number of decoder passes in this step: 0 if the last token was an accepted
            proposal, else 1; one more if the token is computed again because of a tie.
        """
        token, passes = generated[-1], 0
        if self._place < len(self._proposed) and self._proposed[self._place] == token:
            self._place += 1
            self.accepted += 1
            self._cost.token()
        else:
            self.discard_unverified(state)
            passes = 1
            proposed = self._propose(generated, remaining)
            if not proposed:
                return self._plain_step(state, token), passes
            self._verify(state, token, proposed)
        logits = self._logits[self._place]
        if self._is_tie(logits, scores(logits)):
            state.truncate(state.lengths - (len(self._proposed) - self._place) - 1)
            self._clear()
            return self._plain_step(state, token), passes + 1
        return logits[None], passes

    def discard_unverified(self, state: RowState) -> None:
        """Removes the proposed tokens that are not accepted from the KV cache."""
        if self._proposed:
            self._cost.accepted(self._place)
            rejected = len(self._proposed) - self._place
            if rejected:
                state.truncate(state.lengths - rejected)
        self._clear()

    def _clear(self) -> None:
        self._proposed, self._place = [], 0

    def _propose(self, generated: Sequence[int], remaining: int) -> list[int]:
        most = min(self._cost.width, self._most, remaining - 1)
        if most < 1 or not self._cost.pays:
            return []
        start = self._cost.clock()
        proposed = self._draft.propose(generated, most)[:most]
        self._seconds = self._cost.clock() - start
        if not proposed:
            self._cost.speculative_pass(self._seconds)
        return proposed

    def _verify(self, state: RowState, token: int, proposed: list[int]) -> None:
        start = self._cost.clock()
        self._logits = state.extend(np.array([[token, *proposed]], np.int64))[0]
        self._cost.speculative_pass(self._seconds + self._cost.clock() - start)
        self._cost.token()
        self._proposed, self._place = proposed, 0
        self.drafted += len(proposed)

    def _plain_step(self, state: RowState, token: int) -> NDArray[np.float32]:
        start = self._cost.clock()
        logits = state.step(np.array([token], np.int64))
        self._cost.plain_step(self._cost.clock() - start)
        return logits

    def _is_tie(self, logits: NDArray[np.float32], scores: NDArray[np.float32]) -> bool:
        """Returns whether the two best scores differ by less than the tie margin; NaN counts as a tie."""
        best = int(scores.argmax())
        second = max(scores[:best].max(initial=-np.inf), scores[best + 1 :].max(initial=-np.inf))
        bound = self._tie_margin * max(abs(logits.max()), abs(logits.min()))
        with np.errstate(invalid="ignore"):  # minus infinity, where all tokens are excluded
            return not bool(scores[best] - second > bound)


class PromptLookup:
    """Proposes tokens without a model: searches the text for an earlier place with the same last tokens.

    The tokens after that place are proposed.

    Args:
        prompt_ids: The prompt's ids.
        longest: Largest number of last tokens to search for; if they do not occur, fewer are searched for.
    """

    def __init__(self, prompt_ids: Sequence[int], longest: int = 3) -> None:
        self._prompt = list(prompt_ids)
        self._longest = longest

    def propose(self, generated: Sequence[int], most: int) -> list[int]:
        """Proposes the tokens after the longest match; if several matches are equally long, after the last of them."""
        ids = [*self._prompt, *generated]
        for size in range(min(self._longest, len(ids) - 1), 0, -1):
            tail = ids[-size:]
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == tail:
                    return ids[start + size : start + size + most]
        return []
