"""Beam search compared with transformers' `_beam_search`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge.runtime.decoding.beam_search import beam_search
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.options import GenerationOptions
from tests.runtime.conftest import generation_arguments, until_end
from tests.runtime.decoding.generating import generate

pytest.importorskip("transformers", reason="the oracle is transformers")

SEEDS = range(8)
LENGTHS = (5, 2, 7)
PLAIN = GenerationOptions(max_new_tokens=14, num_beams=3)


def check(oracle: Any, options: GenerationOptions) -> list[Generated]:
    ours: list[Generated] = oracle.run(options)
    for row, (tokens, score) in zip(ours, oracle.reference(options), strict=True):
        assert row.tokens == tokens
        assert row.score == pytest.approx(score, abs=2e-5, rel=1e-5)
        assert row.finish_reason == ("eos" if row.tokens[-1] in options.eos_token_ids else "length")
    return ours


def ends_of(oracle: Any) -> tuple[int, ...]:
    """End tokens that occur in the beams' and the greedy texts, at different places."""
    beams = oracle.run(PLAIN)
    greedy = oracle.run(replace(PLAIN, num_beams=1))
    return tuple(dict.fromkeys([beams[0].tokens[4], beams[-1].tokens[8], greedy[1].tokens[2]]))


@pytest.mark.parametrize("seed", SEEDS)
def test_beams_are_what_transformers_finds(opt_oracle: Any, seed: int) -> None:
    oracle = opt_oracle(seed, LENGTHS)
    check(oracle, PLAIN)
    ends = ends_of(oracle)
    found = [
        *check(oracle, replace(PLAIN, eos_token_ids=ends[:1])),
        *check(oracle, replace(PLAIN, eos_token_ids=ends)),
    ]
    assert "eos" in {row.finish_reason for row in found}
    check(oracle, replace(PLAIN, eos_token_ids=ends, early_stopping=True))
    check(oracle, replace(PLAIN, eos_token_ids=ends[:2], length_penalty=-1.0))
    check(oracle, replace(PLAIN, eos_token_ids=ends[:2], length_penalty=2.5))
    check(oracle, replace(PLAIN, eos_token_ids=ends[:2], length_penalty=0.0, early_stopping=True))
    check(oracle, replace(PLAIN, eos_token_ids=ends, min_new_tokens=6))
    check(oracle, replace(PLAIN, eos_token_ids=ends, repetition_penalty=1.5))
    check(oracle, replace(PLAIN, eos_token_ids=ends, repetition_penalty=1.2, min_new_tokens=5, num_beams=5))
    check(oracle, replace(PLAIN, eos_token_ids=ends[:2], num_beams=2, max_new_tokens=1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beams", [2, 4])
def test_likely_end_tokens_fill_the_candidates(opt_oracle: Any, seed: int, beams: int) -> None:
    oracle = opt_oracle(seed, (4, 4))
    first, _, _ = oracle.start()
    ends = tuple(np.argsort(-first[0])[:3].tolist())  # end at once, in every leading candidate
    check(oracle, replace(PLAIN, eos_token_ids=ends, num_beams=beams))
    check(oracle, replace(PLAIN, eos_token_ids=ends, num_beams=beams, length_penalty=3.0))
    check(oracle, replace(PLAIN, eos_token_ids=ends, num_beams=beams, min_new_tokens=1, early_stopping=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_enough_unfinished_candidates_stay_among_many_ended(opt_oracle: Any, seed: int) -> None:
    oracle = opt_oracle(seed, (4, 4))
    first, _, _ = oracle.start()
    ends = tuple(np.argsort(-first[0])[1:9].tolist())  # behind the likeliest token, eight that end
    for penalty in (-1.0, 1.0, 3.0):
        check(oracle, replace(PLAIN, eos_token_ids=ends, num_beams=4, length_penalty=penalty))


def test_pictures_of_a_batch_are_as_each_alone_and_leave_when_they_end(opt_oracle: Any) -> None:
    oracle = opt_oracle(6, LENGTHS)
    options = replace(PLAIN, eos_token_ids=ends_of(oracle), early_stopping=True)
    first, state, prompts = oracle.start()
    together = generate(first, state, prompts, options)
    alone = [oracle.run(options, rows=[row])[0] for row in range(3)]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    assert [row.score for row in together] == pytest.approx([row.score for row in alone], abs=1e-5)
    assert state.selects[0] == np.repeat(np.arange(3), 3).tolist()
    assert state.steps == sorted(state.steps, reverse=True)
    assert state.steps[-1] < 9


class _Table:
    """A decoder whose logits depend on the last token alone."""

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table, self.batch_size = table, 1

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.table[token_ids]

    def select(self, rows: NDArray[np.int64]) -> None:
        self.batch_size = len(rows)

    def join(self, other: object) -> None:
        raise AssertionError("nothing joins here")


def test_wide_search_finds_what_trying_all_texts_finds() -> None:
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((5, 5)) * 2).astype(np.float32)
    log_probs = table - np.log(np.exp(table).sum(1, keepdims=True))
    options = GenerationOptions(max_new_tokens=3, num_beams=60, length_penalty=0.0)
    best = max(
        ((i, j, k) for i in range(5) for j in range(5) for k in range(5)),
        key=lambda ids: log_probs[0, ids[0]] + log_probs[ids[0], ids[1]] + log_probs[ids[1], ids[2]],
    )
    found = generate(table[:1], _Table(table), [[]], options)[0]
    assert found.tokens == best
    assert found.finish_reason == "length"


def test_the_best_texts_are_those_that_transformers_returns(opt_oracle: Any) -> None:
    oracle = opt_oracle(3, LENGTHS)
    options = replace(PLAIN, num_beams=4, eos_token_ids=ends_of(oracle))
    found = oracle.run(options, best=3)
    ids, mask, embeds = oracle.inputs(range(len(LENGTHS)))
    reference = oracle.model.generate(
        inputs_embeds=embeds,
        input_ids=ids,
        attention_mask=mask,
        num_return_sequences=3,
        **generation_arguments(options),
    )
    rows = [until_end(row[ids.shape[1] :].tolist(), options) for row in reference.sequences]
    assert [text.tokens for text in found] == rows
    assert [text.score for text in found] == pytest.approx(reference.sequences_scores.tolist(), abs=2e-5, rel=1e-5)
    assert [text.tokens for text in found[::3]] == [text.tokens for text in oracle.run(options)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"min_new_tokens": 9},
        {"repetition_penalty": 1.4},
        {"num_beams": 1},
        {"num_beams": 1, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_transformers(opt_oracle: Any, changes: dict[str, Any]) -> None:
    """The log-softmax of the decoder's logits, as `compute_transition_scores` takes them from `output_logits`."""
    oracle = opt_oracle(4, LENGTHS)
    options = replace(PLAIN, **{"num_beams": 4, "eos_token_ids": ends_of(oracle), **changes})
    ids, mask, embeds = oracle.inputs(range(len(LENGTHS)))
    arguments = {**generation_arguments(options), "output_logits": True, "output_scores": True}
    reference = oracle.model.generate(inputs_embeds=embeds, input_ids=ids, attention_mask=mask, **arguments)
    beams = reference.beam_indices if options.num_beams > 1 else None
    expected = oracle.model.compute_transition_scores(
        reference.sequences, reference.logits, beams, normalize_logits=True
    )
    for text, row in zip(oracle.run(options), expected.tolist(), strict=True):
        assert len(text.token_logprobs) == len(text.tokens)
        assert list(text.token_logprobs) == pytest.approx(row[: len(text.tokens)], abs=1e-4)
        assert text.logprob == pytest.approx(sum(text.token_logprobs), abs=1e-9)


@pytest.mark.parametrize("changes", [{}, {"min_new_tokens": 9}, {"repetition_penalty": 1.4}], ids=str)
def test_the_log_probability_is_the_models_own(opt_oracle: Any, changes: dict[str, Any]) -> None:
    """With one beam, beam search finds the greedy text: two ways to the same values."""
    oracle = opt_oracle(4, LENGTHS)
    options = replace(PLAIN, num_beams=1, length_penalty=0.0, eos_token_ids=ends_of(oracle), **changes)
    first, state, prompts = oracle.start()
    beams = beam_search(first, state, prompts, options)
    for text, beam in zip(oracle.run(options), beams, strict=True):
        assert text.tokens == beam.tokens
        assert list(text.token_logprobs) == pytest.approx(beam.token_logprobs, abs=1e-4)
        if "repetition_penalty" not in changes:
            assert beam.logprob == pytest.approx(beam.score, abs=1e-4)
