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

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, Axis, CacheSpec
from blip2edge.engine.decoder.constant_shape import (
    constant_shape_spec,
    to_constant_shape,
)
from blip2edge.errors import BackendError, EngineError
from tests.engine.conftest import BundleOf
from tests.engine.families import DECODERS
from tests.engine.forms import CAPACITY, compare_moves, decoders, rewritten, save_rewritten

WITHIN = 1e-4  # of logits; the largest seen is 1.3e-5


@pytest.mark.parametrize("name", DECODERS)
def test_every_move_gives_the_logits_of_the_growing_cache(name: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    path = bundle_of(name)
    compare_moves(path, *decoders(path, tmp_path), WITHIN)


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
    path = save_rewritten(bundle.file("decoder.onnx"), bundle.manifest.cache, tmp_path / "constant.onnx")
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
    model = rewritten(bundle.file(spec.file), cache)
    assert [value.name for value in model.graph.inputs] == [tensor.name for tensor in fixed.inputs]
    assert [value.name for value in model.graph.outputs] == [tensor.name for tensor in fixed.outputs]
    with pytest.raises(ValueError, match="at least 2 slots, for a prompt and a token, got 1"):
        constant_shape_spec(spec, cache, 1)
