"""Fewer passes of the language model: somebody cheaper guesses the next tokens, and one pass verifies them all.

The language model reads its last token and the guesses in one pass and gives logits behind each. As long as the token
that these choose is the one that was guessed, the next logits are there already; the first wrong guess is forgotten
with all behind it (Leviathan et al., arXiv 2211.17192, with a draft that is taken or left). Tokens are chosen from
the model's own logits in every case, so the text is that of plain decoding whatever the guesses are.

A text of its own for each row; several rows at once are decoded plainly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.decoding.state import RowState

MOST_DRAFTED = 15
"""Tokens that a pass verifies at most beside its own; the exported decoders give logits for 16 slots."""

CLOSE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""How near the two best scores may be to each other, as a share of the largest, for a pass over several tokens to
decide between them, by the decoder's precision. Several tokens at once are added up in another order than one alone;
what is nearer is decided by a pass of its own, as plain decoding would."""

CLOSE_QUANTISED = 3e-2
"""The same for INT8 and INT4 decoders."""


class Drafter(Protocol):
    """Guesses how one text goes on."""

    def propose(self, generated: Sequence[int], most: int) -> list[int]:
        """Guesses.

        Args:
            generated: The language model's ids so far, at least one.
            most: At most so many.

        Returns:
            Ids of the language model; none where there is no guess.
        """
        ...


class Payoff:
    """What guessing costs and gains, measured as it goes, over all texts of a captioner; and whether it pays.

    A plain step's seconds are measured on the first steps and now and then later. Where a token by guesses costs more
    than that, guessing rests, and is tried again after a while, which grows as long as it does not pay.

    Args:
        clock: Gives seconds.
    """

    LEARN = 3  # plain steps before the first guess
    AGAIN = 64  # passes between two measurements of a plain step
    TRIAL = 4  # passes before a judgement
    FADE = 0.9  # what a pass keeps of those before it
    SHORTEST_REST, LONGEST_REST = 128, 8192  # tokens

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.plain_seconds = 0.0
        self._steps = 0
        self._passes = 0  # since the last rest
        self._since_plain = 0
        self._spent = self._gained = 0.0
        self._accepted = float(MOST_DRAFTED)
        self._rest = 0
        self._next_rest = self.SHORTEST_REST

    @property
    def pays(self) -> bool:
        """Whether to guess at the next step."""
        return self._steps >= self.LEARN and self._rest == 0 and self._since_plain < self.AGAIN

    @property
    def seconds_per_token(self) -> float:
        """Of guesses and their verification, lately; infinite where nothing was gained."""
        return self._spent / self._gained if self._gained else math.inf

    @property
    def width(self) -> int:
        """How many tokens to guess: somewhat more than were right lately."""
        return min(MOST_DRAFTED, math.ceil(1.5 * self._accepted) + 1)

    def step(self, seconds: float) -> None:
        """A plain step was taken."""
        # The first runs of a session warm it up: the quickest of the first counts, later ones are averaged in.
        learning = self._steps < self.LEARN
        quickest = min(self.plain_seconds or seconds, seconds)
        self.plain_seconds = quickest if learning else 0.8 * self.plain_seconds + 0.2 * seconds
        self._steps += 1
        self._since_plain = 0
        if self._rest:
            self._rest -= 1

    def spend(self, seconds: float) -> None:
        """A pass with guesses was made, or guesses were looked for in vain."""
        self._spent = self.FADE * self._spent + seconds
        self._gained *= self.FADE
        self._passes += 1
        self._since_plain += 1
        if self._passes > self.TRIAL and self.seconds_per_token > self.plain_seconds:
            self._rest, self._next_rest = self._next_rest, min(4 * self._next_rest, self.LONGEST_REST)
            self._passes, self._spent, self._gained = 0, 0.0, 0.0
        elif self._passes > 4 * self.TRIAL:
            self._next_rest = self.SHORTEST_REST

    def gain(self) -> None:
        """A token was got from a pass with guesses."""
        self._gained += 1

    def learn(self, right: int) -> None:
        """So many guesses of a pass were right."""
        self._accepted = 0.7 * self._accepted + 0.3 * right


class Ahead:
    """Reads ahead in one row's text, and in no other after it.

    Args:
        drafter: Guesses.
        payoff: Says whether to.
        close: See :data:`CLOSE`.
        most: The most tokens of a guess.

    Attributes:
        drafted: Tokens that were guessed so far.
        right: How many of them were right.
    """

    def __init__(
        self, drafter: Drafter, payoff: Payoff, close: float = CLOSE["fp32"], most: int = MOST_DRAFTED
    ) -> None:
        self._drafter = drafter
        self._payoff = payoff
        self._close = close
        self._most = most
        self._guesses: list[int] = []  # of the last pass
        self._place = 0  # how many of them were right
        self._seconds = 0.0  # that they took
        self._logits = np.empty((0, 0), np.float32)  # [guesses + 1, V]
        self.drafted = self.right = 0

    def step(
        self,
        state: RowState,
        generated: Sequence[int],
        left: int,
        scores: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    ) -> tuple[NDArray[np.float32], int]:
        """The logits behind the last token of a text.

        Args:
            state: The decoder; one row.
            generated: The ids so far; the last was chosen from what the step before this one gave.
            left: How many tokens may follow.
            scores: What logits ``[V]`` are before a token is chosen from them.

        Returns:
            Logits ``[1, V]``, and the passes of the decoder that it took: 0, 1 or 2.
        """
        token, passes = generated[-1], 0
        if self._place < len(self._guesses) and self._guesses[self._place] == token:
            self._place += 1
            self.right += 1
            self._payoff.gain()
        else:
            self.settle(state)
            passes = 1
            guesses = self._propose(generated, left)
            if not guesses:
                return self._alone(state, token), passes
            self._pass(state, token, guesses)
        logits = self._logits[self._place]
        if self._is_close(logits, scores(logits)):
            state.truncate(state.lengths - (len(self._guesses) - self._place) - 1)
            self._forget()
            return self._alone(state, token), passes + 1
        return logits[None], passes

    def settle(self, state: RowState) -> None:
        """Lets the decoder forget what it has read ahead."""
        if self._guesses:
            self._payoff.learn(self._place)
            wrong = len(self._guesses) - self._place
            if wrong:
                state.truncate(state.lengths - wrong)
        self._forget()

    def _forget(self) -> None:
        self._guesses, self._place = [], 0

    def _propose(self, generated: Sequence[int], left: int) -> list[int]:
        most = min(self._payoff.width, self._most, left - 1)
        if most < 1 or not self._payoff.pays:
            return []
        start = self._payoff.clock()
        guesses = self._drafter.propose(generated, most)[:most]
        self._seconds = self._payoff.clock() - start
        if not guesses:
            self._payoff.spend(self._seconds)
        return guesses

    def _pass(self, state: RowState, token: int, guesses: list[int]) -> None:
        start = self._payoff.clock()
        self._logits = state.extend(np.array([[token, *guesses]], np.int64))[0]
        self._payoff.spend(self._seconds + self._payoff.clock() - start)
        self._payoff.gain()
        self._guesses, self._place = guesses, 0
        self.drafted += len(guesses)

    def _alone(self, state: RowState, token: int) -> NDArray[np.float32]:
        start = self._payoff.clock()
        logits = state.step(np.array([token], np.int64))
        self._payoff.step(self._payoff.clock() - start)
        return logits

    def _is_close(self, logits: NDArray[np.float32], scores: NDArray[np.float32]) -> bool:
        """Whether the two best scores are too near for a pass over several tokens to decide; NaN is near to all."""
        best = int(scores.argmax())
        second = max(scores[:best].max(initial=-np.inf), scores[best + 1 :].max(initial=-np.inf))
        bound = self._close * max(abs(logits.max()), abs(logits.min()))
        return not bool(scores[best] - second > bound)


class Lookup:
    """Guesses that the text goes on as it did before behind the same last words (prompt lookup).

    Args:
        prompt_ids: The prompt's ids.
        longest: The most last tokens that are looked for.
    """

    def __init__(self, prompt_ids: Sequence[int], longest: int = 3) -> None:
        self._prompt = list(prompt_ids)
        self._longest = longest

    def propose(self, generated: Sequence[int], most: int) -> list[int]:
        """See :class:`Drafter`; the latest place with the most last tokens counts."""
        ids = [*self._prompt, *generated]
        for size in range(min(self._longest, len(ids) - 1), 0, -1):
            tail = ids[-size:]
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == tail:
                    return ids[start + size : start + size + most]
        return []
