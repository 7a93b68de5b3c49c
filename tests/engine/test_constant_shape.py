"""The decoder with a cache of constant capacity, compared with the growing cache, in ONNX Runtime."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="graphs are rewritten with onnx_ir")
pytest.importorskip("onnxruntime", reason="graphs run on ONNX Runtime")

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, Axis, CacheSpec
from blip2edge.engine.constant_shape import (
    constant_shape_spec,
    to_constant_shape,
)
from blip2edge.errors import BackendError, EngineError
from blip2edge.runtime.backends.base import OptimizedFile, open_session
from blip2edge.runtime.backends.onnxruntime_cpu import open_graph
from blip2edge.runtime.decoding.kv.fixed import FixedDecoder
from blip2edge.runtime.decoding.kv.growing import GrowingDecoder
from blip2edge.runtime.decoding.language_model import load_language_model
from tests.engine.conftest import BundleOf
from tests.engine.families import DECODERS
from tests.engine.host_cache import HostCache

WITHIN = 1e-4  # of logits; the largest seen is 1.3e-5
CAPACITY = 40
RAGGED = (3, 9, 6)  # lengths of the prompts


def loaded(path: Path, cache: CacheSpec) -> ir.Model:
    """A decoder's graph in its constant-shape form; its weights stay on disk."""
    model = ir.load(path)
    to_constant_shape(model, cache, str(path))
    return model


def save_constant_shape(path: Path, cache: CacheSpec, output: Path) -> Path:
    """Writes the turned decoder without its weights: they stay in the file beside the first one."""
    ir.save(loaded(path, cache), output)
    return output


def decoders(path: Path, directory: Path, max_rows: int = 16) -> tuple[GrowingDecoder, FixedDecoder]:
    """Both forms of a bundle's decoder."""
    bundle = Bundle.open(path)
    cache, spec = bundle.manifest.cache, bundle.graph(DECODER).spec
    assert cache is not None
    grows: Any = load_language_model(bundle, lambda name: open_session(bundle.file(f"{name}.onnx"), "cpu", 1))
    written = save_constant_shape(bundle.file(spec.file), cache, directory / "constant.onnx")
    session = open_graph(written, 1, OptimizedFile(bundle.path))
    decoder: GrowingDecoder = grows.decoder

    def open_cache(batch: int, context: Any) -> HostCache:
        return HostCache(session, cache, CAPACITY, decoder.cache_dtype, batch, context)

    fixed = constant_shape_spec(spec, cache, CAPACITY)
    return decoder, FixedDecoder(open_cache, fixed, CAPACITY, max_rows, decoder.table)


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
            context[tensor.name] = rng.normal(size=shape).astype(np.float32)
    return context


@pytest.mark.parametrize("name", DECODERS)
def test_every_move_gives_the_logits_of_the_growing_cache(name: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """A ragged batch: steps, beams, several tokens at once, forgotten ones, further rows, a full cache."""
    path = bundle_of(name)
    grows, fixed = decoders(path, tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.normal(0, 0.7, (length, grows.table.width)).astype(np.float32) for length in RAGGED]
    context = drawn_context(path, len(RAGGED), max(RAGGED), rng)
    (expected, state), (got, slots) = grows.prefill(prompts, context), fixed.prefill(prompts, context)
    compared = 0

    def same(first: NDArray[np.float32], second: NDArray[np.float32]) -> None:
        nonlocal compared
        np.testing.assert_allclose(second, first, atol=WITHIN, rtol=0)
        assert (first.argmax(-1) == second.argmax(-1)).all()
        compared += 1

    same(expected, got)
    for _ in range(4):
        tokens = expected.argmax(-1)
        expected, got = state.step(tokens), slots.step(tokens)
        same(expected, got)
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
    assert compared > 20


def test_no_room_is_told(bundle_of: BundleOf, tmp_path: Path) -> None:
    _, fixed = decoders(bundle_of("blip2-opt"), tmp_path, max_rows=2)
    prompt = np.zeros((CAPACITY, fixed.table.width), np.float32)
    with pytest.raises(BackendError, match=r"3 rows .* more than the 2 .*max_batch"):
        fixed.prefill([prompt[:3]] * 3)
    with pytest.raises(BackendError, match=r"41 tokens are more than the capacity of 40 tokens .*capacity"):
        fixed.prefill([np.zeros((CAPACITY + 1, fixed.table.width), np.float32)])
    _, state = fixed.prefill([prompt])
    with pytest.raises(BackendError, match="41 tokens"):
        state.step(np.array([5]))
    with pytest.raises(BackendError, match="3 rows"):
        state.select(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="cannot keep"):
        state.truncate(np.array([CAPACITY + 1]))


def test_the_weights_are_on_disk_once(bundle_of: BundleOf, tmp_path: Path) -> None:
    """The new file names the data file of the first, and holds none of it."""
    bundle = Bundle.open(bundle_of("blip2-opt"))
    assert bundle.manifest.cache is not None
    path = save_constant_shape(bundle.file("decoder.onnx"), bundle.manifest.cache, tmp_path / "constant.onnx")
    old, new = (onnx.load(one, load_external_data=False) for one in (bundle.file("decoder.onnx"), path))
    external = {item.name: item for item in old.graph.initializer if item.external_data}
    assert external
    for item in new.graph.initializer:
        if item.name in external:
            assert item.external_data[0].value == external[item.name].external_data[0].value
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size < 2 * bundle.file("decoder.onnx").stat().st_size


def test_another_graph_is_refused() -> None:
    """Nothing is guessed where the cache is not appended to as the export does it."""
    from blip2edge.bundle.schema import CacheSpec

    def value(name: str, shape: list[Any]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    cache = CacheSpec(1, 1, 2)
    past = [value(name, [1, 1, "past", 2]) for name in cache.past_names()]
    nodes = [ir.node("Identity", [one]) for one in past]
    outputs = list(itertools.chain.from_iterable(node.outputs for node in nodes))
    for output, name in zip(outputs, cache.present_names(), strict=True):
        output.name = name
    model = ir.Model(ir.Graph(past, outputs, nodes=nodes, opset_imports={"": 18}), ir_version=10)
    with pytest.raises(EngineError, match=r"past_key_values\.0\.key is not appended to by one Concat"):
        to_constant_shape(model, cache, "other.onnx")
    with pytest.raises(EngineError, match=r"no input past_key_values\.1\.key"):
        to_constant_shape(model, CacheSpec(2, 1, 2), "other.onnx")


def test_the_spec_has_one_capacity(bundle_of: BundleOf) -> None:
    bundle = Bundle.open(bundle_of("llava"))
    spec, cache = bundle.graph(DECODER).spec, bundle.manifest.cache
    assert cache is not None
    fixed = constant_shape_spec(spec, cache, CAPACITY)
    assert "past" not in fixed.axes()
    assert fixed.axes()["capacity"] == Axis("capacity", 40, 40, 40)
    model = loaded(bundle.file(spec.file), cache)
    assert [value.name for value in model.graph.inputs] == [tensor.name for tensor in fixed.inputs]
    assert [value.name for value in model.graph.outputs] == [tensor.name for tensor in fixed.outputs]
    with pytest.raises(ValueError, match="1 slots"):
        constant_shape_spec(spec, cache, 1)
