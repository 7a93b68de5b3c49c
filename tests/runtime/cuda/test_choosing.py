"""Tokens that are chosen with the kernels: greedy, drawn and beams, against the portable graph and the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="the portable graph runs in ONNX Runtime")

from blip2edge.errors import BackendError
from blip2edge.runtime.cuda.decoding.choice import TokenChoice
from blip2edge.runtime.cuda.decoding.decoder import AHEAD, KernelState
from blip2edge.runtime.cuda.decoding.session import KernelBuffers
from blip2edge.runtime.decoding.kv import in_place
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.sampling import StepScores, penalize_repetition
from blip2edge.runtime.decoding.state import ChoosingState
from tests.runtime.cuda.pairs import EVERY, SLOW, TOLERANCE, Array, Pair
from tests.runtime.cuda.shim_device import ShimDevice
from tests.runtime.decoding.generating import generate, rows_of


@pytest.mark.parametrize(("kind", "precision"), [EVERY[0], pytest.param("llama", "int4", marks=SLOW), *EVERY[2:]])
def test_greedy_tokens_are_chosen_on_the_device(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """With a penalty, an end token that is held, rows of different lengths, and a cache that grows on the way."""
    monkeypatch.setattr(in_place, "ROOM", 2)
    pair = pair_of(kind, precision, (1, 2, 3, 5))
    prompts = pair.prompts((12, 3))  # the cache has room for 16 slots at first
    (found, ours), (wanted, theirs) = pair.kernels.prefill(prompts), pair.graph.prefill(prompts)
    tokens = pair.same(found, wanted)
    held = np.array([int(theirs_next) for theirs_next in wanted.argsort(axis=-1)[1, -3:]])
    rules = [StepScores(np.array([7, 8]), 1.0), StepScores(np.arange(5, 40), 1.3, held, 2)]
    seen = [list(rule.seen) for rule in rules]
    assert isinstance(ours, ChoosingState)
    assert ours.gives_logprobs
    greedy = ours.choose(tokens, rules)
    for step in range(6):
        logits = theirs.step(tokens)
        scores = logits.copy()
        for row, rule in enumerate(rules):
            penalize_repetition(scores[row], np.unique(seen[row]), rule.penalty)
            if step < rule.held_steps:
                scores[row, rule.held] = -np.inf
        tokens = scores.argmax(axis=-1)
        chosen, logprobs = next(greedy)
        assert chosen.tolist() == tokens.tolist()
        exact = logits[[0, 1], tokens] - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
        assert np.abs(logprobs - exact).max() < 2 * TOLERANCE * np.abs(logits).max()
        for row, token in enumerate(tokens):
            seen[row].append(token)
    greedy.close()
    assert ours.lengths.tolist() == [18, 9]
    # In each of two caches one step ran as it is; the others are replays of one graph, a step ahead of the tokens.
    assert (pair.shim.captured, pair.shim.replayed) == (2, 6 - 2 + (AHEAD - 1))
    assert not pair.shim.fetched
    found, wanted = ours.step(tokens), theirs.step(tokens)  # the state holds all tokens but the last ones
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def copied_reorder(buffers: KernelBuffers, rows: Array, lengths: Array) -> None:
    """Copies the cache at each selection."""
    buffers._origins.select(rows, lengths)
    buffers.settle(lengths[rows])


@pytest.mark.parametrize(("kind", "precision"), [EVERY[0], pytest.param("llama", "int4", marks=SLOW), *EVERY[2:]])
def test_beam_search_reorders_a_table_and_gives_the_graphs_ids(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """The cache is copied once if prompts differ in length, else never; it also grows on the way."""
    monkeypatch.setattr(in_place, "ROOM", 2)
    pair = pair_of(kind, precision, (1, 2, 3, 5))
    for lengths, moves in (((6, 6), 0), ((3, 6), 1), ((5,), 0)):
        for options in BEAMS:
            (found, ours), (wanted, theirs) = (one.prefill(pair.prompts(lengths)) for one in (pair.kernels, pair.graph))
            ids = [[5]] * len(lengths)
            before = pair.session.moves
            texts = generate(found, ours, ids, options)
            assert pair.session.moves - before == moves
            found, copying = pair.kernels.prefill(pair.prompts(lengths))
            with monkeypatch.context() as copies:
                copies.setattr(KernelBuffers, "reorder", copied_reorder)
                assert generate(found, copying, ids, options) == texts  # log-probabilities as well, bit for bit
            assert pair.session.moves - before > moves
            oracle = generate(wanted, theirs, ids, options)
            assert [one.tokens for one in texts] == [one.tokens for one in oracle], options
            # The state goes on after the search: greedy steps need the rows in their own memory.
            tokens, steps = np.arange(30, 30 + ours.batch_size), []
            for state in (ours, copying):
                assert isinstance(state, KernelState)
                greedy = state.choose(tokens, [StepScores(np.zeros(0, np.int64))] * len(tokens))
                steps.append([next(greedy)[0].tolist() for _ in range(2)])
                greedy.close()
            assert steps[0] == steps[1]


BEAMS = (
    GenerationOptions(max_new_tokens=7, num_beams=3),
    GenerationOptions(max_new_tokens=6, num_beams=2, length_penalty=0.5, repetition_penalty=1.2, eos_token_ids=(9, 31)),
)


DRAWN = (
    GenerationOptions(max_new_tokens=6, temperature=0.9, seed=4),
    GenerationOptions(max_new_tokens=6, top_k=8, top_p=0.9, repetition_penalty=1.3, seed=5),
    GenerationOptions(max_new_tokens=6, temperature=0.7, top_p=0.8, min_new_tokens=3, eos_token_ids=(9, 11), seed=6),
)


@pytest.mark.parametrize(("kind", "precision"), [EVERY[0], pytest.param("llama", "int4", marks=SLOW), *EVERY[2:]])
def test_drawn_tokens_are_those_of_the_portable_graph(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """For the same seed; the GPU draws with the host's random numbers, so that no logits are read after the prompt.

    The host draws the same texts from the kernels' logits. Those of the graph differ in rounding, so that a number at
    the border of two tokens may give the other one; the graph gets the kernels' tokens as earlier tokens.
    """
    pair = pair_of(kind, precision, (1, 2, 3, 5))
    reads: list[Any] = []
    equal = total = 0

    def read(*given: Any) -> Array:
        reads.append(given[1:])
        return ShimDevice.read(pair.shim, *given)

    for options in DRAWN:
        (found, ours), (wanted, theirs) = (one.prefill(pair.prompts((6, 3))) for one in (pair.kernels, pair.graph))
        with monkeypatch.context() as counted:
            counted.setattr(pair.shim, "read", read)
            texts = generate(found, ours, [[5], [7]], options)
        with monkeypatch.context() as host:
            host.setattr(KernelState, "draws", False)
            again = generate(*pair.kernels.prefill(pair.prompts((6, 3))), [[5], [7]], options)
        assert [one.tokens for one in texts] == [one.tokens for one in again], options
        rows = rows_of(wanted, [[5], [7]], options)
        for tokens in zip_longest(*(one.tokens for one in texts), fillvalue=0):
            chosen = [row.choose(logits) for row, logits in zip(rows, wanted, strict=True)]
            equal += int(np.sum(np.array(chosen) == tokens))
            total += len(tokens)
            for row, token in zip(rows, tokens, strict=True):
                row.accept(token)
            wanted = theirs.step(np.array(tokens))
    assert equal >= 0.9 * total, (equal, total)
    assert set(reads) == {((2, 2), np.int32)}  # tokens and log-probabilities
    assert not pair.shim.fetched


def test_a_token_that_is_left_to_the_host_is_drawn_there(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After slot 8 the GPU has no random numbers: the host goes on, and the cache has all tokens until then."""
    pair, options = pair_of("opt", "fp32", (1, 2, 3, 5)), DRAWN[1]
    begin = TokenChoice.begin

    def with_few_numbers(choice: TokenChoice, *given: Any) -> None:
        monkeypatch.setattr(choice, "_slots", 9)
        begin(choice, *given)

    monkeypatch.setattr(TokenChoice, "begin", with_few_numbers)
    (found, ours), (wanted, theirs) = (one.prefill(pair.prompts((6, 3))) for one in (pair.kernels, pair.graph))
    texts, oracle = (generate(*one, [[5], [7]], options) for one in ((found, ours), (wanted, theirs)))
    assert [one.tokens for one in texts] == [one.tokens for one in oracle]
    assert isinstance(ours, KernelState)
    assert ours.lengths.tolist() == [6 + 5, 3 + 5]
    assert not pair.shim.fetched


def test_the_first_error_of_a_step_is_reported(pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that were launched ahead fail as well; all of them are waited for."""
    pair = pair_of("opt", "fp32", (1, 2, 3, 5))
    found, ours = pair.kernels.prefill(pair.prompts((4,)))
    errors: list[str] = []

    def failing(*_: Any) -> Callable[[], Array]:
        def wait() -> Array:
            errors.append(f"error {len(errors) + 1}")
            raise BackendError(errors[-1])

        return wait

    monkeypatch.setattr(pair.shim, "fetch", failing)
    assert isinstance(ours, ChoosingState)
    with pytest.raises(BackendError, match="error 1"):
        next(ours.choose(found.argmax(axis=-1), [StepScores(np.zeros(0, np.int64))]))
    assert len(errors) == AHEAD


def test_the_driver_gives_the_graphs_ids_and_a_later_text_replays(pair_of: Callable[..., Pair]) -> None:
    """Two texts, one after the other: the second one runs in the memory of the first, so that nothing is captured."""
    pair = pair_of("opt", "fp32", (1, 2, 3, 5), driver=True)
    calls, plain = pair.driver.calls, [StepScores(np.zeros(0, np.int64), 1.0)]
    made: Counter[str] = Counter()
    for text in range(2):
        before = Counter(calls)
        (found, ours), (wanted, theirs) = (
            pair.kernels.prefill(pair.prompts((7,))),
            pair.graph.prefill(pair.prompts((7,))),
        )
        tokens = pair.same(found, wanted)
        assert isinstance(ours, ChoosingState)
        greedy = ours.choose(tokens, plain)
        for _ in range(5):
            tokens = theirs.step(tokens).argmax(axis=-1)
            assert next(greedy)[0].tolist() == tokens.tolist()
        greedy.close()
        pair.same(ours.step(tokens), theirs.step(tokens))
        del greedy, ours
        made = Counter(calls) - before
        # The prefill, and a step on the host, are captured when they are repeated; greedy steps in the first text.
        assert made["cuGraphInstantiate"] == (1, 2)[text]
        assert made["cuGraphLaunch"] == (4 + AHEAD - 1, 1 + 5 + AHEAD - 1 + 1)[text]
    assert made["cuMemAlloc"] == 0
    assert made["cuStreamSynchronize"] == 2  # the logits that the host reads
