"""Speculative decoding: same text as plain decoding, fewer passes, switched off where it saves no time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge.errors import UsageError
from blip2edge.runtime.decoding.draft_model import remainder
from blip2edge.runtime.decoding.generate import Generation, GenerationBatch
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.speculative import PromptLookup, SpeculationCost, Speculator
from tests.runtime.decoding.generating import generate, stream

VOCABULARY, END = 50, 7
PROMPTS = [[11, 12], [13], [14, 15, 16]]


class Words:
    """A language model whose logits are a hash of all that it has read; notes what is asked of it."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.rows = [list(row) for row in rows]
        self.asked: list[int] = []
        self.ties: set[int] = set()  # lengths at which the two best are as good as equal
        self.noise = 0.0  # of passes over several tokens

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(row) for row in self.rows])

    def logits(self, row: Sequence[int]) -> NDArray[np.float32]:
        scores = np.random.default_rng([len(row), *row[-3:]]).standard_normal(VOCABULARY).astype(np.float32)
        if len(row) in self.ties:
            first, second = np.argsort(-scores)[:2]
            scores[second] = scores[first] - 1e-6
        return scores

    def first(self) -> NDArray[np.float32]:
        return np.stack([self.logits(row) for row in self.rows])

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.extend(token_ids[:, None])[:, 0]

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.asked.append(token_ids.shape[1])
        out: list[list[NDArray[np.float32]]] = []
        for row, tokens in zip(self.rows, token_ids.tolist(), strict=True):
            out.append([])
            for token in tokens:
                row.append(token)
                scores = self.logits(row)
                if len(tokens) > 1 and self.noise:
                    scores = scores + np.where(scores == scores.max(), -self.noise, 0).astype(np.float32)
                out[-1].append(scores)
        return np.array(out, np.float32)

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        assert np.all(lengths <= self.lengths)
        self.rows = [row[:length] for row, length in zip(self.rows, lengths.tolist(), strict=True)]

    def select(self, rows: NDArray[np.int64]) -> None:
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def join(self, other: Any) -> None:
        self.rows += other.rows


class Oracle:
    """Guesses what the model will say, and every so often something else."""

    def __init__(self, truth: Sequence[int], wrong_every: int = 0) -> None:
        self.truth, self.wrong_every = list(truth), wrong_every

    def propose(self, generated: Sequence[int], most: int) -> list[int]:
        start = len(generated)
        guess = self.truth[start : start + most]
        if self.wrong_every:
            return [
                (token + 1) % VOCABULARY if (start + at) % self.wrong_every == 0 else token
                for at, token in enumerate(guess)
            ]
        return guess


class Eager(SpeculationCost):
    """Always guesses."""

    @property
    def pays(self) -> bool:
        return True


def plain(prompt: Sequence[int], options: GenerationOptions) -> Any:
    """Decoding without guesses."""
    state = Words([prompt])
    return generate(state.first(), state, [prompt], options)[0]


OPTIONS = (
    GenerationOptions(max_new_tokens=40),
    GenerationOptions(max_new_tokens=40, eos_token_ids=(END,)),
    GenerationOptions(max_new_tokens=25, min_new_tokens=20, repetition_penalty=1.4, eos_token_ids=(END,)),
    GenerationOptions(max_new_tokens=30, temperature=0.7, top_k=4, seed=3),
    GenerationOptions(
        max_new_tokens=30, no_repeat_ngram_size=1, suppress_tokens=(3, 4, 5, 6), forced_eos_token_id=(END,)
    ),
)


def test_a_text_whose_tokens_are_all_excluded_is_that_of_plain_decoding() -> None:
    options = GenerationOptions(max_new_tokens=6, suppress_tokens=tuple(range(VOCABULARY)))
    state, speculator = Words([[11]]), Speculator(Oracle([0] * 6), Eager())
    assert generate(state.first(), state, [[11]], options, speculators=[speculator])[0].tokens == (0,) * 6
    assert speculator.drafted  # each of them is a tie, and decided by a pass over one token
    assert plain([11], options).tokens == (0,) * 6


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrong_every", [0, 1, 3, 5])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_is_that_of_plain_decoding(prompt: list[int], wrong_every: int, options: GenerationOptions) -> None:
    wanted = plain(prompt, options)
    state = Words([prompt])
    speculator = Speculator(Oracle(wanted.tokens, wrong_every), Eager())
    found = generate(state.first(), state, [prompt], options, speculators=[speculator])[0]
    assert found.tokens == wanted.tokens
    assert found.finish_reason == wanted.finish_reason
    assert found.tokens_per_pass == pytest.approx(len(wanted.tokens) / (1 + len(state.asked)))
    assert sum(state.asked) <= len(wanted.tokens) + speculator.drafted - speculator.accepted
    if wrong_every == 0 and len(wanted.tokens) > 16:
        assert found.tokens_per_pass > 6
        assert speculator.accepted == speculator.drafted
    if wrong_every == 1:
        assert speculator.accepted == 0
    again = Speculator(Oracle(wanted.tokens, wrong_every), Eager())
    events = stream(Words([prompt]).first(), Words([prompt]), [prompt], options, speculators=[again])
    assert tuple(token for _, token, _ in events) == wanted.tokens


def test_nothing_is_read_that_no_token_needs() -> None:
    options = GenerationOptions(max_new_tokens=9)
    wanted = plain([5], options)
    state = Words([[5]])
    generate(state.first(), state, [[5]], options, speculators=[Speculator(Oracle(wanted.tokens), Eager())])
    assert state.asked == [8]  # of nine tokens the last is generated and not read


def test_near_ties_are_decided_by_a_pass_of_their_own() -> None:
    options = GenerationOptions(max_new_tokens=12)
    state = Words([[5]])
    state.ties, state.noise = {4, 7}, 2e-6  # where noise of this size would choose the other token
    again = Words([[5]])
    again.ties = state.ties
    wanted = generate(again.first(), again, [[5]], options)[0]
    found = generate(state.first(), state, [[5]], options, speculators=[Speculator(Oracle(wanted.tokens), Eager())])[0]
    assert found.tokens == wanted.tokens
    assert 1 in state.asked
    careless = Words([[5]])
    careless.ties, careless.noise = state.ties, state.noise
    speculator = Speculator(Oracle(wanted.tokens), Eager(), tie_margin=0.0)
    other = generate(careless.first(), careless, [[5]], options, speculators=[speculator])[0]
    assert other.tokens != wanted.tokens  # the case is a case


def test_rows_that_join_end_the_reading_ahead() -> None:
    options = GenerationOptions(max_new_tokens=20)
    texts = [plain(prompt, options).tokens for prompt in PROMPTS]
    together = GenerationBatch()
    rows = []
    for prompt, truth in zip(PROMPTS, texts, strict=True):
        state = Words([prompt])
        row = Generation(prompt, options, VOCABULARY, speculator=Speculator(Oracle(truth, 6), Eager()))
        together.join(state.first(), state, [row])
        rows.append(row)
        for _ in range(4):
            together.step()
    while together.rows:
        together.step()
    assert [tuple(row.generated) for row in rows] == texts
    assert len(rows[0].generated) / rows[0].passes > 1
    assert rows[2].passes > 3  # alone at the end, after the others had left


def test_prompt_lookup() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 2, 3, 9])
    assert lookup.propose([7, 2, 3], 4) == [9, 7, 2, 3]  # the latest place
    assert lookup.propose([8, 1, 2], 2) == [3, 4]
    assert lookup.propose([8], 2) == []
    assert PromptLookup([]).propose([4, 4], 3) == [4]
    options = GenerationOptions(max_new_tokens=30)
    state = Words([PROMPTS[0]])
    found = generate(
        state.first(),
        state,
        [PROMPTS[0]],
        options,
        speculators=[Speculator(PromptLookup(PROMPTS[0]), Eager())],
    )
    assert found[0].tokens == plain(PROMPTS[0], options).tokens


class Timed:
    """Counts seconds of a made-up machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Words):
    """Every pass takes a second, and a part of one for each further token."""

    def __init__(self, rows: Sequence[Sequence[int]], clock: Timed, further: float) -> None:
        super().__init__(rows)
        self.clock, self.further = clock, further

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.clock.now += 1 + self.further * (token_ids.shape[1] - 1)
        return super().extend(token_ids)


def seconds(cost: SpeculationCost, clock: Timed, further: float, wrong_every: int, texts: int) -> float:
    """Seconds of decoding some texts, one after the other."""
    options, start = GenerationOptions(max_new_tokens=30), clock.now
    for number in range(texts):
        prompt = [number % 40, 3]
        wanted = plain(prompt, options)
        state = Slow([prompt], clock, further)
        speculator = Speculator(Oracle(wanted.tokens, wrong_every), cost)
        assert generate(state.first(), state, [prompt], options, speculators=[speculator])[0].tokens == wanted.tokens
    return clock.now - start


def state_of(cost: SpeculationCost) -> bool:
    """Whether it guesses, asked anew."""
    return cost.pays


def test_it_switches_itself_off_where_it_does_not_pay() -> None:
    plainly = 29.0  # seconds a text
    clock = Timed()
    cost = SpeculationCost(clock)
    assert seconds(cost, clock, further=0.05, wrong_every=4, texts=20) < 0.6 * 20 * plainly
    assert cost.pays
    clock = Timed()
    cost = SpeculationCost(clock)
    assert seconds(cost, clock, further=0.5, wrong_every=1, texts=40) < 1.1 * 40 * plainly
    assert state_of(cost) is False
    # and on again, when guesses are right
    seconds(cost, clock, further=0.05, wrong_every=0, texts=200)
    assert state_of(cost) is True
    assert cost.width > 10


def test_a_plain_step_is_measured_first_and_now_and_then() -> None:
    cost = SpeculationCost()
    assert state_of(cost) is False
    for taken in (9.0, 2.0, 3.0):
        cost.plain_step(taken)
    assert cost.plain_seconds == 2.0  # the first runs warm a session up
    for _ in range(SpeculationCost.AGAIN):
        assert state_of(cost) is True
        cost.speculative_pass(1.0)
        cost.token()
    assert state_of(cost) is False
    cost.plain_step(4.0)
    assert state_of(cost) is True
    assert cost.plain_seconds == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("written", "drafted", "rest"),
    [
        ("", "a dog", "a dog"),
        (" a", "a dog", " dog"),
        ("A Dog,", "a dog , a cat", " a cat"),
        ("a dog", "a dog", ""),
        ("a dog on", "a dog", None),
        ("a cat", "a dog", None),
    ],
)
def test_what_a_draft_holds_behind_a_text(written: str, drafted: str, rest: str | None) -> None:
    assert remainder(written, drafted) == rest


def test_drafts_are_named_and_beams_read_nothing_ahead() -> None:
    with pytest.raises(UsageError, match="draft to be one of auto, none, lookup, itg, got 'guess'"):
        GenerationOptions(draft="guess")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="num_beams 1 with draft lookup, got 3"):
        GenerationOptions(draft="lookup", num_beams=3)
    GenerationOptions(draft="none", num_beams=3)
