"""Both rewritten forms of a decoder, and their comparison with the growing cache, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, Axis, CacheSpec
from blip2edge.engine.decoder.cache_forms import FORMS
from blip2edge.engine.profiles import LONGEST_DRAFT
from blip2edge.runtime.backends.base import OptimizedFile
from blip2edge.runtime.backends.onnxruntime_cpu import open_graph
from blip2edge.runtime.captioning.assemble import load_language_model
from blip2edge.runtime.decoding.kv.fixed import FixedDecoder
from blip2edge.runtime.decoding.kv.growing import GrowingDecoder
from tests.engine.host_cache import HostCache

CAPACITY = 40
RAGGED = (3, 9, 6)  # lengths of the prompts


def rewritten(path: Path, cache: CacheSpec, form: str = "constant") -> ir.Model:
    """A decoder's graph in one of the forms; its weights stay on disk."""
    model = ir.load(path)
    FORMS[form].rewrite(model, cache, CAPACITY, str(path))
    return model


def save_rewritten(path: Path, cache: CacheSpec, output: Path, form: str = "constant") -> Path:
    """Writes the rewritten decoder without its weights: they stay in the file beside the first one."""
    ir.save(rewritten(path, cache, form), output)
    return output


def decoders(
    path: Path,
    directory: Path,
    max_rows: int = 16,
    form: str = "constant",
    change: Callable[[ir.Model], None] = lambda model: None,
) -> tuple[GrowingDecoder, FixedDecoder]:
    """The exported decoder of a bundle, and one with a cache of constant capacity; ``change`` changes its graph."""
    bundle = Bundle.open(path)
    cache, spec = bundle.manifest.cache, bundle.graph(DECODER).spec
    assert cache is not None
    as_written = OptimizedFile(bundle.path)  # both without ONNX Runtime's fusions, which round INT4 products otherwise
    grows: Any = load_language_model(bundle, lambda name: open_graph(bundle.file(f"{name}.onnx"), 1, as_written))
    model = rewritten(bundle.file(spec.file), cache, form)
    change(model)
    ir.save(model, directory / f"{form}.onnx")
    session = open_graph(directory / f"{form}.onnx", 1, as_written)
    decoder: GrowingDecoder = grows.decoder

    def open_cache(batch: int, context: Any) -> HostCache:
        return HostCache(session, cache, CAPACITY, decoder.cache_dtype, batch, context)

    return decoder, FixedDecoder(
        open_cache, FORMS[form].describe(spec, cache, CAPACITY), CAPACITY, max_rows, decoder.table
    )


def drawn_context(path: Path, rows: int, steps: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Keys, values and a mask for what a decoder looks at beside its text."""
    context: dict[str, NDArray[Any]] = {}
    for tensor in Bundle.open(path).graph(DECODER).spec.inputs:
        if not tensor.name.startswith("cross"):
            continue
        lengths = {"batch": rows, "steps": steps, "source": 7}
        shape = [max(lengths[dim.name], dim.min) if isinstance(dim, Axis) else dim for dim in tensor.dims]
        if tensor.dtype == "int64":
            context[tensor.name] = rng.integers(0, 2, shape)
            context[tensor.name][..., 0] = 1
        else:
            context[tensor.name] = rng.normal(size=shape).astype(tensor.dtype)
    return context


def compare_moves(path: Path, grows: GrowingDecoder, fixed: FixedDecoder, within: float) -> None:
    """A ragged batch: steps, beams, several tokens at once, forgotten ones, further rows, a full cache.

    Args:
        path: The decoders' bundle.
        grows: The decoder whose cache grows.
        fixed: The decoder whose cache has a constant capacity.
        within: Largest difference of logits.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.normal(0, 0.7, (length, grows.table.width)).astype(np.float32) for length in RAGGED]
    context = drawn_context(path, len(RAGGED), max(RAGGED), rng)
    (expected, state), (got, slots) = grows.prefill(prompts, context), fixed.prefill(prompts, context)
    compared = 0

    def same(first: NDArray[np.float32], second: NDArray[np.float32]) -> None:
        nonlocal compared
        np.testing.assert_allclose(second, first, atol=within, rtol=0)
        assert (first.argmax(-1) == second.argmax(-1)).all()
        compared += 1

    same(expected, got)
    for _ in range(4):
        tokens = expected.argmax(-1)
        expected, got = state.step(tokens), slots.step(tokens)
        same(expected, got)
    tokens = rng.integers(0, 80, (len(RAGGED), LONGEST_DRAFT))
    kept = state.lengths
    same(state.extend(tokens), slots.extend(tokens))
    for accepted in ([2, 0, LONGEST_DRAFT], [0, 0, 0]):
        state.truncate(kept + accepted)
        slots.truncate(kept + accepted)
    rows = np.array([2, 0, 0, 1])
    state.select(rows)
    slots.select(rows)
    tokens = rng.integers(0, 80, (4, 3))
    same(state.extend(tokens), slots.extend(tokens))
    kept = state.lengths - np.array([0, 2, 1, 2])
    state.truncate(kept)
    slots.truncate(kept)
    assert slots.lengths.tolist() == state.lengths.tolist() == kept.tolist()
    same(state.step(tokens[:, 0]), slots.step(tokens[:, 0]))
    two = {key: value[:2] for key, value in context.items()}
    state.join(grows.prefill(prompts[:2], two)[1])
    slots.join(fixed.prefill(prompts[:2], two)[1])
    tokens = rng.integers(0, 80, (6, 1))
    same(state.extend(tokens), slots.extend(tokens))
    short = np.flatnonzero(state.lengths < state.lengths.max())
    state.select(short)
    slots.select(short)
    while slots.slot < CAPACITY:
        tokens = rng.integers(0, 80, len(short))
        same(state.step(tokens), slots.step(tokens))
    same(state.step(tokens), slots.step(tokens))  # the slots that only the longest row used are free again
    assert slots.slot < CAPACITY
    assert compared > 9, compared
