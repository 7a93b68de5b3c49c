"""Greedy decoding and sampling compared with transformers' `generate` and logits processors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge.errors import BackendError, UsageError
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.sampling import draw, filter_scores, log_softmax, top_k_indices
from tests.runtime.decoding.generating import generate, stream

pytest.importorskip("torch", reason="the oracle runs in torch")
pytest.importorskip("transformers", reason="the oracle is transformers")
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process

SEEDS = range(8)
LENGTHS = (5, 2, 7)


def ends_of(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """End tokens that really occur, at another place in each text."""
    return tuple(dict.fromkeys([texts[0][4], texts[-1][9]]))


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_is_what_transformers_generates(opt_oracle: Any, seed: int) -> None:
    oracle = opt_oracle(seed, LENGTHS)
    plain = GenerationOptions(max_new_tokens=16)
    free = oracle.run(plain)
    assert [(row.tokens, None) for row in free] == oracle.reference(plain)
    assert {row.finish_reason for row in free} == {"length"}
    ends = ends_of([row.tokens for row in free])
    for options in (
        replace(plain, eos_token_ids=ends),
        replace(plain, eos_token_ids=ends, min_new_tokens=7),
        replace(plain, eos_token_ids=ends[:1], repetition_penalty=1.4),
        replace(plain, eos_token_ids=ends, repetition_penalty=0.8, min_new_tokens=3),
        replace(plain, max_new_tokens=1),
    ):
        ours = oracle.run(options)
        assert [(row.tokens, row.score) for row in ours] == oracle.reference(options)
        for row in ours:
            ended = row.tokens[-1] in options.eos_token_ids
            assert row.finish_reason == ("eos" if ended else "length")
            assert ended or len(row.tokens) == options.max_new_tokens
    assert oracle.run(replace(plain, eos_token_ids=ends))[0].finish_reason == "eos"


def test_rows_of_a_batch_are_as_each_alone_and_leave_when_they_end(opt_oracle: Any) -> None:
    oracle = opt_oracle(3, LENGTHS)
    free = oracle.run(GenerationOptions(max_new_tokens=12))
    options = GenerationOptions(max_new_tokens=12, eos_token_ids=(free[1].tokens[3],))
    first, state, prompts = oracle.start()
    together = generate(first, state, prompts, options)
    alone = [oracle.run(options, rows=[row])[0] for row in range(3)]
    assert together == alone
    running = [sum(len(row.tokens) > step for row in alone) for step in range(1, 12)]
    assert state.steps == [rows for rows in running if rows]
    assert min(len(row.tokens) for row in alone) < 12
    assert state.selects  # somebody left


def test_stream_tells_every_token_before_the_next_step(opt_oracle: Any) -> None:
    oracle = opt_oracle(1, LENGTHS)
    options = GenerationOptions(max_new_tokens=5)
    first, state, prompts = oracle.start()
    tokens: list[list[int]] = [[], [], []]
    for row, token, finish_reason in stream(first, state, prompts, options):
        tokens[row].append(token)
        assert len(state.steps) == len(tokens[row]) - 1
        assert finish_reason == ("length" if len(tokens[row]) == 5 else None)
    assert [tuple(row) for row in tokens] == [row.tokens for row in oracle.run(options)]


def test_the_prompt_counts_for_the_repetition_penalty(opt_oracle: Any) -> None:
    oracle = opt_oracle(5, LENGTHS)
    options = GenerationOptions(max_new_tokens=10, repetition_penalty=3.0)
    first, state, prompts = oracle.start()
    seen = generate(first, state, prompts, options)
    assert [(row.tokens, None) for row in seen] == oracle.reference(options)
    first, state, _ = oracle.start()
    assert generate(first, state, [[], [], []], options) != seen
    first, state, prompts = oracle.start()
    outside = [[*ids, 10**6, -5] for ids in prompts]  # placeholders outside the vocabulary
    assert generate(first, state, outside, options) == seen


class _EveryThird(StoppingCriteria):
    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([enough(row[self.prompt :].tolist()) for row in input_ids])


def enough(ids: Sequence[int]) -> bool:
    return len(ids) > 2 and sum(ids) % 3 == 0


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_callback(opt_oracle: Any, beams: int) -> None:
    for seed in SEEDS:
        oracle = opt_oracle(seed, (4,))
        options = GenerationOptions(max_new_tokens=12, num_beams=beams)
        row = oracle.run(options, stopped=enough)[0]
        criteria = StoppingCriteriaList([_EveryThird(len(oracle.prompts[0]))])
        tokens, score = oracle.reference(options, criteria)[0]
        assert row.tokens == tokens
        assert row.score == (None if score is None else pytest.approx(score, abs=1e-5))
        assert row.finish_reason == ("stop" if enough(row.tokens) else "length")


@pytest.mark.parametrize("seed", SEEDS)
def test_encoder_decoder_start_token(t5_oracle: Any, seed: int) -> None:
    oracle = t5_oracle(seed)
    free = oracle.run(GenerationOptions(max_new_tokens=10))
    ends = (free[0].tokens[4], free[1].tokens[7])
    for options in (
        GenerationOptions(max_new_tokens=10),
        GenerationOptions(max_new_tokens=10, eos_token_ids=ends, min_new_tokens=4, repetition_penalty=1.5),
        GenerationOptions(max_new_tokens=10, eos_token_ids=ends, num_beams=3, length_penalty=2.0),
        GenerationOptions(max_new_tokens=10, eos_token_ids=ends, num_beams=2, repetition_penalty=1.3),
    ):
        for row, (tokens, score) in zip(oracle.run(options), oracle.reference(options), strict=True):
            assert row.tokens == tokens
            assert row.score == (None if score is None else pytest.approx(score, abs=1e-5))


def warped(scores: NDArray[np.float32], temperature: float | None, top_k: int | None, top_p: float | None) -> Any:
    """The scores after transformers' warpers, in the order of `_get_logits_processor`."""
    out, ids = torch.from_numpy(scores.copy())[None], torch.zeros(1, 1, dtype=torch.long)
    if temperature is not None and temperature != 1.0:
        out = logits_process.TemperatureLogitsWarper(temperature)(ids, out)
    if top_k:
        out = logits_process.TopKLogitsWarper(top_k)(ids, out)
    if top_p is not None and top_p < 1.0:
        out = logits_process.TopPLogitsWarper(top_p)(ids, out)
    return out[0].numpy()


@pytest.mark.parametrize("vocabulary", [7, 97, 5000, 50272])
@pytest.mark.parametrize("temperature", [None, 0.7, 5.0])
def test_filters_equal_transformers_warpers(vocabulary: int, temperature: float | None) -> None:
    rng = np.random.default_rng(vocabulary)
    top_ks, top_ps = (None, 0, 1, 5, 50, 10**6), (None, 0.0, 0.3, 0.9, 0.999, 1.0)
    for scale, top_k, top_p in itertools.product((0.1, 3.0), top_ks, top_ps):
        scores = (rng.standard_normal(vocabulary) * scale).astype(np.float32)
        ours = np.full(vocabulary, -np.inf, np.float32)
        kept, values = filter_scores(scores, temperature, top_k, top_p)
        ours[slice(None) if kept is None else kept] = values
        np.testing.assert_array_equal(ours, warped(scores, temperature, top_k, top_p))


def test_top_k_keeps_ties_and_masked_tokens_stay_out() -> None:
    scores = np.array([1, 3, 3, 2, 3, -np.inf], np.float32)
    kept, _ = filter_scores(scores, None, 2, None)
    assert kept is not None
    assert kept.tolist() == [1, 2, 4]
    rng = np.random.default_rng(0)
    assert 5 not in {draw(scores, rng) for _ in range(500)}


@pytest.mark.parametrize(("size", "k"), [(10, 10), (1000, 3), (50272, 10), (4096, 900), (129, 1)])
def test_top_k_indices(size: int, k: int) -> None:
    rng = np.random.default_rng(size)
    values = rng.integers(0, size // 2, size).astype(np.float32)  # with ties
    expected = np.lexsort((np.arange(size), -values))[:k]
    np.testing.assert_array_equal(top_k_indices(values, k), expected)
    values[rng.integers(0, size, size // 2)] = -np.inf
    np.testing.assert_array_equal(values[top_k_indices(values, k)], -np.sort(-values)[:k])


def test_draws_follow_the_distribution() -> None:
    scores = (np.random.default_rng(4).standard_normal(40) * 2).astype(np.float32)
    expected = np.exp(warped(scores, 0.8, 12, 0.9).astype(np.float64))
    expected /= expected.sum()
    rng, count = np.random.default_rng(5), 20_000
    drawn = np.bincount([draw(scores, rng, 0.8, 12, 0.9) for _ in range(count)], minlength=40)
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))
    deviation = np.abs(drawn / count - expected) / np.sqrt(np.maximum(expected, 1e-12) / count)
    assert deviation[expected > 0].max() < 4.0  # standard deviations


def test_sampling_is_reproducible_and_independent_of_batches(opt_oracle: Any) -> None:
    oracle = opt_oracle(2, LENGTHS)
    options = GenerationOptions(max_new_tokens=12, temperature=1.5, top_p=0.95, top_k=40, seed=11)
    together = oracle.run(options)
    assert together == oracle.run(options)
    assert together != oracle.run(replace(options, seed=12))
    assert together == [oracle.run(options, rows=[row], row_ids=[row])[0] for row in range(3)]
    assert together[1:] == oracle.run(options, rows=[1, 2], row_ids=[1, 2])
    free = replace(options, seed=None)
    assert oracle.run(free) != oracle.run(free)
    ends = (together[1].tokens[2],)
    ended = oracle.run(replace(options, eos_token_ids=ends))  # a row that leaves changes no other
    for row, full in zip(ended, together, strict=True):
        assert row.tokens == full.tokens[: len(row.tokens)]
    assert len(ended[1].tokens) <= 3


def test_greedy_limits_of_sampling(opt_oracle: Any) -> None:
    oracle = opt_oracle(2, LENGTHS)
    greedy = oracle.run(GenerationOptions(max_new_tokens=6))
    limits: dict[str, Any]
    for limits in (
        {"temperature": 0.0, "top_p": 0.5},
        {"top_k": 1},
        {"top_p": 0.0},
        {"temperature": 1e-6},
        {"temperature": np.float32(0), "top_p": 0.5},
        {"temperature": np.int64(0)},
    ):
        assert oracle.run(GenerationOptions(max_new_tokens=6, **limits)) == greedy


def test_broken_logits_are_an_error(opt_oracle: Any) -> None:
    for options in (
        GenerationOptions(),
        GenerationOptions(temperature=0.5),
        GenerationOptions(num_beams=2),
        GenerationOptions(repetition_penalty=2.0),
    ):
        first, state, prompts = opt_oracle(0).start()
        first = first.copy()
        first[0, 5] = np.nan
        with pytest.raises(BackendError, match="NaN"):
            generate(first, state, prompts, options)


def test_log_softmax_is_torchs() -> None:
    logits = (np.random.default_rng(0).standard_normal((3, 5000)) * 20).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 30}, "min_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 1e4}, "length_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"eos_token_ids": (-1,)}, "eos_token_ids"),
        ({"stop": ("",)}, "stop"),
        ({"stop": "."}, "stop"),
        ({"num_beams": 2, "top_p": 0.9}, "num_beams"),
    ],
)
def test_options_outside_their_range(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        GenerationOptions(**values)
    assert "\n" not in str(caught.value)
