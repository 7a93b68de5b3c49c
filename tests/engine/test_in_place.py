"""The decoder that updates its KV cache in place: compared with the growing cache, and built for RTX."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="graphs are rewritten with onnx_ir")
pytest.importorskip("onnxruntime", reason="graphs run on ONNX Runtime")

import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, Axis
from blip2edge.engine.builder import BuildOptions, build_engine
from blip2edge.engine.decoder.cache_forms import choose_form
from blip2edge.engine.operators import VERSIONS
from blip2edge.engine.prepare import EnginePlan, plans_of
from blip2edge.engine.support import check_graph
from blip2edge.errors import EngineError
from blip2edge.runtime.backends.engine_files import CONSTANT, IN_PLACE
from blip2edge.runtime.decoding.kv.fixed import CACHE_POSITION
from blip2edge.runtime.tensorrt.session import load_tensorrt
from tests.engine.conftest import BundleOf
from tests.engine.families import DECODERS
from tests.engine.forms import CAPACITY, RAGGED, compare_moves, decoders, rewritten
from tests.engine.rtx import HAS_RTX

EVERY = [pytest.param(name, marks=[] if name in ("blip2-opt", "llava") else pytest.mark.slow) for name in DECODERS]
WITHIN = {"fp32": 1e-4, "int4": 1e-4, "fp16": 6e-2}
"""Of logits; the largest seen are 3e-5, 1.5e-5 and 4.6e-2. ONNX Runtime's ``Attention`` adds up in fp16 on the CPU."""

SM = (86, 89, 120)
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="TensorRT for RTX is not installed (extra rtx)")


def planned(path: Path, decoder: str = IN_PLACE, version: str = "rtx") -> EnginePlan:
    plans = plans_of(Bundle.open(path), VERSIONS[version], capacity=CAPACITY, decoder=decoder)
    return next(plan for plan in plans if plan.name == DECODER)


@pytest.mark.parametrize("precision", WITHIN)
@pytest.mark.parametrize("name", EVERY)
def test_every_move_gives_the_tokens_of_the_growing_cache(
    name: str, precision: str, bundle_of: BundleOf, tmp_path: Path
) -> None:
    if precision == "fp16" and name in ("blip", "blip2-t5"):
        pytest.skip("ONNX Runtime's sums in fp16 are too coarse for these unscaled or wide scores; see the next test")
    path = bundle_of(name, precision)
    compare_moves(path, *decoders(path, tmp_path, form=IN_PLACE), WITHIN[precision])


def attention_in_fp32(model: ir.Model) -> None:
    """Computes ``Attention`` in FP32 and rounds its result, because ONNX Runtime adds up in fp16."""
    graph, half = model.graph, ir.TensorType(ir.DataType.FLOAT16)

    def cast(value: ir.Value | None, to: ir.DataType, before: ir.Node) -> ir.Value:
        assert value is not None
        node = ir.node("Cast", [value], attributes={"to": int(to)})
        node.outputs[0].name = f"{before.outputs[0].name}.{to.name}.{value.name}"
        graph.insert_before(before, node)
        return node.outputs[0]

    for node in [node for node in graph if node.op_type == "Attention"]:
        for index in range(3):
            node.replace_input_with(index, cast(node.inputs[index], ir.DataType.FLOAT, node))
        back = ir.node("Cast", [node.outputs[0]], attributes={"to": int(ir.DataType.FLOAT16)})
        back.outputs[0].name, back.outputs[0].type = f"{node.outputs[0].name}.rounded", half
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_after(node, back)
        for user, index in list(node.outputs[0].uses()):
            if user is not back:
                user.replace_input_with(index, back.outputs[0])


@pytest.mark.parametrize("name", EVERY)
def test_fp16_differs_by_the_sums_of_attention_alone(name: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    path = bundle_of(name, "fp16")
    compare_moves(path, *decoders(path, tmp_path, form=IN_PLACE, change=attention_in_fp32), 4e-2)  # seen: 3.3e-2


def written(path: Path, directory: Path) -> onnxruntime.InferenceSession:
    """The decoder in ONNX Runtime itself, for calls that the decoders of the runtime do not make."""
    bundle = Bundle.open(path)
    assert bundle.manifest.cache is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    ir.save(rewritten(bundle.file("decoder.onnx"), bundle.manifest.cache, IN_PLACE), directory / "written.onnx")
    content = (directory / "written.onnx").read_bytes()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["blip2-opt", "llava"])
def test_each_row_has_its_own_place_in_one_tensor(name: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """Rows of different lengths without padding on the left; ``past`` and ``present`` are one tensor."""
    path = bundle_of(name)
    grows, _ = decoders(path, tmp_path, form=IN_PLACE)
    cache, session, rng = Bundle.open(path).manifest.cache, written(path, tmp_path), np.random.default_rng(1)
    assert cache is not None
    rows, width = len(RAGGED), grows.table.width
    prompts = [rng.normal(0, 0.7, (length, width)).astype(np.float32) for length in RAGGED]
    shape = (rows, cache.num_heads, CAPACITY, cache.head_dim)
    kept = {past: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for past in cache.past_names()}

    def run(embeds: NDArray[np.float32], first: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.float32]:
        bound = session.io_binding()
        feeds: dict[str, Any] = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((rows, CAPACITY), np.int64),
            "position_ids": first[:, None] + np.arange(embeds.shape[1]),
            "logits_indices": asked,
            CACHE_POSITION: first,
        }
        for feed, value in feeds.items():
            bound.bind_cpu_input(feed, value)
        for past, present in zip(cache.past_names(), cache.present_names(), strict=True):
            bound.bind_ortvalue_input(past, kept[past])
            bound.bind_ortvalue_output(present, kept[past])
        bound.bind_output("logits")
        session.run_with_iobinding(bound)
        logits: NDArray[np.float32] = bound.get_outputs()[-1].numpy()
        return logits

    states = [grows.prefill([prompt]) for prompt in prompts]
    padded = np.stack([np.concatenate([one, np.ones((max(RAGGED) - len(one), width), np.float32)]) for one in prompts])
    lengths = np.array(RAGGED)
    got = run(padded, np.zeros(rows, np.int64), lengths[:, None] - 1)
    np.testing.assert_allclose(got[:, 0], np.concatenate([logits for logits, _ in states]), atol=1e-4, rtol=0)
    for steps in (1, 16, 1):
        tokens = rng.integers(0, 80, (rows, steps))
        wanted = np.concatenate([state.extend(tokens[[row]]) for row, (_, state) in enumerate(states)])
        got = run(grows.embed(tokens), lengths, np.tile(np.arange(steps), (rows, 1)))
        np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)
        assert (got.argmax(-1) == wanted.argmax(-1)).all()
        lengths = lengths + steps


def test_the_graph_is_as_tensorrt_wants_it(bundle_of: BundleOf) -> None:
    """A constant capacity, the axis -2, a bool mask for each row, and heads that are not repeated."""
    plan = planned(bundle_of("llava"))
    assert plan.spec.axes()["capacity"] == Axis("capacity", CAPACITY, CAPACITY, CAPACITY)
    model = plan.model()
    assert [value.name for value in model.graph.inputs] == [tensor.name for tensor in plan.spec.inputs]
    assert [value.name for value in model.graph.outputs] == [tensor.name for tensor in plan.spec.outputs]
    inputs = {value.name: value for value in model.graph.inputs}
    nodes = {kind: [node for node in model.graph if node.op_type == kind] for kind in ("TensorScatter", "Attention")}
    for node in nodes["TensorScatter"]:
        assert node.attributes["axis"].as_int() == -2
        assert node.inputs[0] in inputs.values()
        assert node.outputs[0] in model.graph.outputs
        assert node.inputs[2] is inputs[CACHE_POSITION]
    for node in nodes["Attention"]:
        assert set(node.attributes) == {"scale"}  # not is_causal, which is read as upper left
        query, key, _, mask = node.inputs  # not nonpad_kv_seqlen, which is dropped
        assert query is not None
        assert key is not None
        assert mask is not None
        assert (query.shape[1], key.shape[1], key.shape[2]) == (4, 2, CAPACITY)  # type: ignore[index]
        assert mask.dtype == ir.DataType.BOOL
    assert len(nodes["TensorScatter"]) == 2 * len(nodes["Attention"]) > 0


def test_it_is_chosen_where_version_and_graph_allow_it(bundle_of: BundleOf) -> None:
    path = bundle_of("blip2-opt")
    for name in VERSIONS:
        plan = planned(path, "auto", name)
        can = name not in ("10.3", "10.13")
        assert plan.form == (IN_PLACE if can else CONSTANT)
        assert plan.reason == ("" if can else f"TensorRT {name} cannot update a KV cache in place, " + NEWER)
        assert check_graph(plan.model(), VERSIONS[name]) == []
        assert planned(path, CONSTANT, name).form == CONSTANT
    with pytest.raises(EngineError, match=r"TensorRT 10\.3 cannot update .* newer can; build with decoder constant"):
        planned(path, IN_PLACE, "10.3")


def test_another_graph_keeps_the_constant_shapes(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Nothing is guessed where attention is not computed as the export does it."""
    bundle = Bundle.open(bundle_of("blip2-opt"))
    assert bundle.manifest.cache is not None
    model = ir.load(bundle.file("decoder.onnx"))
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    softmax.op_type = "Hardmax"
    ir.save(model, tmp_path / "other.onnx")
    shutil.copy(bundle.file("decoder.onnx.data"), tmp_path)
    form, reason = choose_form("auto", tmp_path / "other.onnx", bundle.manifest.cache, VERSIONS["rtx"])
    assert form == CONSTANT
    assert reason.startswith("the decoder other.onnx cannot be rewritten to a KV cache that is updated in place: ")
    assert reason.endswith("is read by 0 nodes Softmax, not by one")
    with pytest.raises(EngineError, match=r"not by one; build with decoder constant"):
        choose_form(IN_PLACE, tmp_path / "other.onnx", bundle.manifest.cache, VERSIONS["rtx"])


NEWER = "TensorRT 10.15 and newer can"


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("name", EVERY)
def test_it_builds(name: str, precision: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    plan, file = planned(bundle_of(name, precision)), tmp_path / "decoder.engine"
    built = build_engine(load_tensorrt("rtx"), plan, VERSIONS["rtx"], file, BuildOptions("rtx", SM))
    assert built.size == file.stat().st_size > 0
    assert built.profiles == ("prefill", "decode", "verify")


@needs_rtx
@pytest.mark.parametrize("sm", [75, *SM])
def test_a_kernel_for_attention_itself_is_there_in_fp16(
    sm: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four heads of 80, as in OPT-2.7b. TensorRT has none for fewer heads, heads of 8 (the tiny models), or FP32."""
    from blip2edge.export.pipeline import export_checkpoint
    from tests import drawing
    from tests.traces import shared_directory

    root = shared_directory(tmp_path_factory, "heads")
    if not (root / "bundle").exists():
        drawing.save(root / "checkpoint", vision_layers=1, qformer_layers=1, layers=1, width=320, heads=4)
        export_checkpoint(root / "checkpoint", root / "bundle", precision="fp16")
    monkeypatch.setattr("blip2edge.engine.prepare.allow_decomposition", lambda model: None)
    plan = planned(root / "bundle")
    options = BuildOptions("rtx", (sm,))
    assert build_engine(load_tensorrt("rtx"), plan, VERSIONS["rtx"], tmp_path / "decoder.engine", options).size > 0
