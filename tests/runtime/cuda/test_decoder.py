"""A whole decoder in kernels, run on the CPU through the shim, against its portable graph: OPT and Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="the portable graph runs in ONNX Runtime")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.errors import BackendError, BundleError
from blip2edge.graph_files import load_graph
from blip2edge.optimization.cuda_kernels.layout import layout_of_graph
from blip2edge.runtime.cuda.decoding import session as sessions
from blip2edge.runtime.cuda.decoding.decoder import KernelState
from blip2edge.runtime.cuda.kernel import Launch
from blip2edge.runtime.cuda.plan import RunSizes, plan_run
from blip2edge.runtime.cuda.weights import DecoderWeights
from tests.runtime.cuda.pairs import EVERY, TOLERANCE, Pair
from tests.runtime.cuda.shim_device import ShimDevice
from tests.runtime.cuda.shimmed import FORWARD, RANDOM


@pytest.mark.parametrize(("kind", "precision"), EVERY)
def test_ragged_batches_drafts_and_beams_give_the_graphs_ids(
    pair_of: Callable[..., Pair], kind: str, precision: str
) -> None:
    pair = pair_of(kind, precision, (1, 2, 3, 5))
    prompts = pair.prompts((6, 3))
    (found, ours), (wanted, theirs) = pair.kernels.prefill(prompts), pair.graph.prefill(prompts)
    for _ in range(4):  # greedy, rows of different lengths
        tokens = pair.same(found, wanted)
        found, wanted = ours.step(tokens), theirs.step(tokens)
    drafted = np.array([[7, 8, 9], [10, 11, 12]])  # three tokens are verified; one, and two, are kept
    pair.same(ours.extend(drafted), theirs.extend(drafted))
    kept = ours.lengths - np.array([2, 1])
    ours.truncate(kept)
    theirs.truncate(kept)
    assert np.array_equal(ours.lengths, theirs.lengths)
    for order in ([1, 0], [0, 0], [1, 0, 1]):  # beams: rows are exchanged, repeated, added
        rows = np.array(order)
        ours.select(rows)
        theirs.select(rows)
        tokens = np.arange(20, 20 + len(rows))
        pair.same(ours.step(tokens), theirs.step(tokens))
    more = np.array([[7, 8], [9, 10], [11, 12]])  # row by row, each with its part of the table of rows
    assert isinstance(ours, KernelState)
    assert ours._buffers.addresses(0).reordered
    pair.same(ours.extend(more), theirs.extend(more))
    ours.join(pair.kernels.prefill(pair.prompts((4,), 2))[1])
    theirs.join(pair.graph.prefill(pair.prompts((4,), 2))[1])
    assert not ours._buffers.addresses(0).reordered
    tokens = np.array([30, 31, 32, 33])
    pair.same(ours.step(tokens), theirs.step(tokens))
    assert pair.compared == 2 * 4 + 6 + 7 + 6 + 4


def test_a_run_is_planned_once_and_memory_is_freed(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[RunSizes] = []

    def planning(weights: DecoderWeights, sizes: RunSizes, *given: Any) -> list[Launch]:
        planned.append(sizes)
        return plan_run(weights, sizes, *given)

    monkeypatch.setattr(sessions, "plan_run", planning)
    monkeypatch.setattr(sessions, "KEPT_SIZES", 2)
    pair = pair_of("opt", "fp32", (1, 2, 3, 5))
    lives = []
    for length in (3, 5, 7, 3):
        _, state = pair.kernels.prefill(pair.prompts((length,)))
        for token in (9, 10, 11):
            state.step(np.array([token]))
        del state
        lives.append(set(pair.shim.memory))
    assert [sizes.steps for sizes in planned] == [3, 1, 5, 7, 3]  # of two sizes, the older one was given up
    assert lives[1] == lives[2]  # prompts of 5 and 7 tokens share buffers
    kept = len(pair.shim.memory)
    for _ in range(3):
        pair.kernels.prefill(pair.prompts((3,)))
    assert len(pair.shim.memory) == kept
    short = iter([True, False])

    def allocate(size: int) -> int:
        if next(short, False):
            raise BackendError("cuMemAlloc failed: out of memory", "lower the batch size")
        return ShimDevice.allocate(pair.shim, size)

    monkeypatch.setattr(pair.shim, "allocate", allocate)
    assert pair.session.take((2, 2, 8, 16)).address in pair.shim.memory  # the free caches made room
    assert len(pair.shim.memory) <= kept
    pair.session.close()
    assert not pair.shim.memory
    with pytest.raises(BackendError, match="this graph is closed"):
        pair.kernels.prefill(pair.prompts((3,)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("opt", "int4"), ("llama", "fp16")])
def test_rows_join_and_the_order_of_threads_changes_nothing(
    pair_of: Callable[..., Pair], kind: str, precision: str
) -> None:
    """Also with as many blocks as a large GPU gets: K and the cache are cut, and the last block adds up."""
    found = []
    for order, multiprocessors in ((FORWARD, 4), (RANDOM, 4), (RANDOM, 200)):
        pair = pair_of(kind, precision, (1, 2, 3, 5), order=order, multiprocessors=multiprocessors)
        ours, theirs = pair.kernels, pair.graph
        (_, first), (_, oracle) = ours.prefill(pair.prompts((20,))), theirs.prefill(pair.prompts((20,)))
        (_, second), (_, other) = ours.prefill(pair.prompts((2, 5), 1)), theirs.prefill(pair.prompts((2, 5), 1))
        first.join(second)
        oracle.join(other)
        tokens, logits = np.array([30, 40, 50]), []
        for _ in range(3):
            logits.append(first.step(tokens))
            tokens = pair.same(logits[-1], oracle.step(tokens))
        found.append(np.array(logits))
    assert np.array_equal(found[0], found[1])  # bit for bit
    assert np.abs(found[0] - found[2]).max() < TOLERANCE * np.abs(found[0]).max()


CHANGES: tuple[tuple[str, str, str], ...] = (
    ("Relu", "Gelu", "the activation of layer 1 is neither ReLU nor SwiGLU"),
    ("LayerNormalization", "Identity", "the final norm is neither a LayerNorm nor an RMSNorm"),
    ("GatherElements", "Identity", "the choice of the positions with logits has another form"),
    ("Softmax", "LogSoftmax", "its attention is not causal self-attention"),
    ("Gather", "GatherND", "its first layer begins with more than embeddings and learned positions"),
)


@pytest.mark.parametrize(("operator", "other", "message"), CHANGES, ids=[change[0] for change in CHANGES])
def test_other_decoders_are_refused_by_name(tiny_bundle: Path, operator: str, other: str, message: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    model = load_graph(bundle.file(f"{DECODER}.onnx"))
    for node in model.graph:
        if node.op_type == operator:
            node.op_type = other
    assert bundle.manifest.cache is not None
    with pytest.raises(BundleError, match=message):
        layout_of_graph(model, bundle.manifest.cache, bundle.manifest.max_positions)


def test_blocks_along_another_axis_are_refused(bundle_of: Callable[[str, str], Path]) -> None:
    bundle = Bundle.open(bundle_of("llama", "int4"))
    model = load_graph(bundle.file(f"{DECODER}.onnx"))
    next(one for one in model.graph if one.op_type == "DequantizeLinear").attributes.pop("axis")  # 1 by default
    assert bundle.manifest.cache is not None
    with pytest.raises(BundleError, match="lie along axis 1, not along the input"):
        layout_of_graph(model, bundle.manifest.cache, bundle.manifest.max_positions)
