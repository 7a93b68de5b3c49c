"""Tokens that a GPU draws with the host's random numbers: who draws, and that the texts are those of the host."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge.runtime.decoding.generate import Generation, GenerationBatch
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.sampling import RowStream, StepScores, draw, penalize_repetition
from blip2edge.runtime.decoding.state import ChosenStep

VOCABULARY = 60


def logits_of(token: int) -> NDArray[np.float32]:
    return (2 * np.random.default_rng(token).standard_normal(VOCABULARY)).astype(np.float32)


class Numbers:
    """The numbers that a GPU got, one for each token."""

    def __init__(self, uniforms: NDArray[np.float64]) -> None:
        self._left = uniforms.tolist()

    def random(self) -> float:
        number: float = self._left.pop(0)
        return number


class DrawingState:
    """Draws as the kernels do; leaves the token to the host after ``most`` tokens."""

    gives_logprobs, draws = True, True

    def __init__(self, rows: int, most: int = 1000) -> None:
        self.batch_size, self.most = rows, most
        self.on_host = self.on_device = self.begun = 0

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.on_host += 1
        return np.array([logits_of(int(token)) for token in token_ids])

    def choose(self, token_ids: NDArray[np.int64], rules: Sequence[StepScores]) -> Generator[ChosenStep, None, None]:
        self.begun += 1
        seen = [set(rule.seen.tolist()) for rule in rules]
        numbers = [None if rule.draws is None else Numbers(rule.draws.uniforms) for rule in rules]
        for _ in range(self.most):
            chosen = []
            for row, (token, rule, stream) in enumerate(zip(token_ids, rules, numbers, strict=True)):
                scores = logits_of(int(token))
                penalize_repetition(scores, np.array(sorted(seen[row]), np.int64), rule.penalty)
                one = rule.draws
                if one is None or stream is None:
                    chosen.append(int(scores.argmax()))
                else:
                    chosen.append(draw(scores, stream, one.temperature, one.top_k, one.top_p))
                seen[row] |= {chosen[-1]} if rule.penalty != 1 else set()
            token_ids = np.array(chosen)
            self.on_device += 1
            yield token_ids, np.full(len(chosen), -0.5, np.float32)

    def select(self, rows: NDArray[np.int64]) -> None:
        self.batch_size = len(rows)

    def join(self, other: Any) -> None:
        self.batch_size += other.batch_size


class HostState(DrawingState):
    draws = False


def texts(
    state: DrawingState, options: Sequence[GenerationOptions], join: int | None = None
) -> list[tuple[tuple[int, ...], int]]:
    """Tokens and log-probabilities of a batch; the last row joins after some steps."""
    rows = [Generation([3], one, VOCABULARY, number=number) for number, one in enumerate(options)]
    first = np.array([logits_of(100 + number) for number in range(len(rows))])
    batch = GenerationBatch()
    early = len(rows) if join is None else len(rows) - 1
    state.batch_size = early
    batch.join(first[:early], state, rows[:early])
    for _ in range(join or 0):
        batch.step()
    if join is not None:
        batch.join(first[early:], type(state)(1), rows[early:])
    while batch.rows:
        batch.step()
    return [(row.result().tokens, len(row.token_logprobs)) for row in rows]


DRAWN = (
    {"temperature": 0.8},
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.1, "top_k": 10**6},
)


def sampled(length: int = 10, **given: Any) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=length, seed=7, **given)


@pytest.mark.parametrize("given", DRAWN)
def test_the_device_draws_the_hosts_texts(given: dict[str, Any]) -> None:
    options = [sampled(**given), sampled(6, **given), GenerationOptions(max_new_tokens=8)]
    for join in (None, 3):
        device, host = DrawingState(2), HostState(2)
        assert texts(device, options, join) == texts(host, options, join)
        assert device.on_host == (0 if join is None else 1)  # a row that joins needs the logits of the others
        assert device.on_device + device.on_host == host.on_device + host.on_host
        assert host.on_host >= 9


@pytest.mark.parametrize("most", [0, 1, 4])
def test_a_token_that_the_device_leaves_is_drawn_by_the_host_with_its_number(most: int) -> None:
    options = [sampled(temperature=1.3), sampled(top_k=4)]
    device = DrawingState(2, most)
    assert texts(device, options) == texts(HostState(2), options)
    assert (device.on_device, device.on_host, device.begun) == (most, 9 - most, 1)


@pytest.mark.parametrize(
    "given",
    [
        {"min_p": 0.1},
        {"typical_p": 0.8},
        {"epsilon_cutoff": 0.01},
        {"eta_cutoff": 0.01},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [4]},
        {"top_logprobs": 2},
    ],
)
def test_what_the_kernels_do_not_know_is_drawn_on_the_host(given: dict[str, Any]) -> None:
    device = DrawingState(1)
    texts(device, [sampled(temperature=0.9, **given)])
    assert (device.on_device, device.on_host) == (0, 9)


def test_numbers_that_are_read_ahead_are_still_given() -> None:
    plain, ahead = RowStream(3, 1), RowStream(3, 1)
    wanted = [plain.random() for _ in range(8)]
    assert ahead.ahead(3).tolist() == wanted[:3]
    assert ahead.random() == wanted[0]
    assert ahead.ahead(5).tolist() == wanted[1:6]
    assert ahead.ahead(2).tolist() == wanted[1:3]
    assert [ahead.random() for _ in range(7)] == wanted[1:]
    assert RowStream(3, 2).random() != wanted[0]
    assert RowStream(None, 1).random() != RowStream(None, 1).random()
