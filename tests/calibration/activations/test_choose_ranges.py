"""Outlier channels and massive tokens: plain ranges lose accuracy, chosen divisions keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from blip2edge.calibration.activations.choose_ranges import ALPHAS, COLUMNS, _divisors, _some_columns, choose_ranges
from blip2edge.calibration.activations.folding import EVERYTHING, find_fold
from blip2edge.calibration.activations.observer import LARGEST_TOKENS, SAMPLED_TOKENS, Observation, Observer
from blip2edge.calibration.activations.qdq import ActivationPlan, insert_qdq
from blip2edge.calibration.agreement import cosine_similarity
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import find_targets
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from tests.calibration.graphs import TOKENS, WIDTH, draw_weights, node, write_graph

HIDDEN = 4 * WIDTH


def norm_then_products(folder: Path, outliers: float) -> None:
    """LayerNormalization with outlier channels, two products, and an MLP whose hidden unit 3 bursts on a token."""
    up, down, other = draw_weights(0, (WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, WIDTH))
    gain = np.ones(WIDTH, np.float32)
    gain[[2, 7]] = outliers
    for weight in (up, other):
        weight[[2, 7]] /= outliers
    up[:, 3] *= 40.0
    down[3] /= 40.0
    write_graph(
        folder,
        [
            node("LayerNormalization", ["x", "gain", "shift"], "normed", axis=-1),
            node("MatMul", ["normed", "up"], "hidden"),
            node("Relu", ["hidden"], "active"),
            node("MatMul", ["active", "down"], "out"),
            node("MatMul", ["normed", "other"], "aside"),
            node("Add", ["out", "aside"], "y"),
        ],
        {"gain": gain, "shift": np.full(WIDTH, 0.1, np.float32), "up": up, "down": down, "other": other},
    )


def draw_inputs(runs: int) -> list[Any]:
    random = np.random.default_rng(6)
    return [random.normal(size=(1, TOKENS, WIDTH)).astype(np.float32) for _ in range(runs)]


def observed(model: ir.Model, folder: Path, inputs: list[Any]) -> dict[str, Observation]:
    from blip2edge.calibration.activations.probe import open_tensors

    names = list(find_targets(model).by_activation())
    observers = {name: Observer(len(inputs), seed) for seed, name in enumerate(names)}
    probe = open_tensors(model, [name for name in names if name != "x"], folder, 0, 1)
    for x in inputs:
        for name, values in {**probe.run({"x": x}), "x": x}.items():
            if name in observers:
                observers[name].update(values)
    return {name: observer.result() for name, observer in observers.items()}


def planned(folder: Path, method: str) -> tuple[ActivationPlan, float]:
    """A plan of the graph in ``folder``, and the cosine of what it computes."""
    inputs = draw_inputs(24)
    model = ir.load(folder / "vision_encoder.onnx")
    targets = find_targets(model)
    observations = observed(model, folder, inputs)
    plan = choose_ranges(model, targets, observations, method)
    with DataFile(folder / f"{method}.onnx.data") as data:
        insert_qdq(model, plan, data)
    ir.save(model, folder / f"{method}.onnx")
    exact, ours = (OnnxRuntimeSession(folder / f"{name}.onnx", 1) for name in ("vision_encoder", method))
    fresh = draw_inputs(28)[24:]
    return plan, float(np.mean([cosine_similarity(exact.run({"x": x})["y"], ours.run({"x": x})["y"]) for x in fresh]))


def test_a_division_keeps_what_one_range_a_tensor_ruins(tmp_path: Path) -> None:
    norm_then_products(tmp_path, outliers=60.0)
    assert planned(tmp_path, "minmax")[1] < 0.99
    plan, likeness = planned(tmp_path, "smooth")
    assert likeness >= 0.999
    divided = {one.name: one.fold for one in plan.activations if one.divisor is not None}
    assert divided["normed"] == (("gain", EVERYTHING), ("shift", EVERYTHING))
    assert divided["active"] == ()  # a Mul does it
    assert not plan.kept_float


def test_without_outliers_no_node_is_added(tmp_path: Path) -> None:
    norm_then_products(tmp_path, outliers=1.0)
    model = ir.load(tmp_path / "vision_encoder.onnx")
    plan = choose_ranges(model, find_targets(model), observed(model, tmp_path, draw_inputs(8)), "smooth")
    assert all(one.fold or one.divisor is None for one in plan.activations if one.name == "normed")


def test_a_product_that_cannot_be_rounded_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norm_then_products(tmp_path, outliers=60.0)
    model = ir.load(tmp_path / "vision_encoder.onnx")
    observations = observed(model, tmp_path, draw_inputs(8))
    monkeypatch.setattr("blip2edge.calibration.activations.choose_ranges.LIMIT", 1e-9)
    plan = choose_ranges(model, find_targets(model), observations, "smooth")
    assert not plan.activations
    assert set(plan.kept_float) == {"node_hidden", "node_out", "node_aside"}
    assert all("rounding would change" in reason for reason in plan.kept_float.values())


def test_a_norm_that_something_else_reads_takes_no_division(tmp_path: Path) -> None:
    norm_then_products(tmp_path, outliers=60.0)
    model = ir.load(tmp_path / "vision_encoder.onnx")
    groups = find_targets(model).by_activation()
    assert find_fold(model, groups["normed"])
    assert find_fold(model, groups["normed"][:1]) == ()  # the other product would read divided values
    assert find_fold(model, groups["active"]) == ()


@pytest.mark.parametrize("packed", [True, False])
def test_attention_takes_the_division_in_its_value_columns(tmp_path: Path, packed: bool) -> None:
    """Query, key and value of one layer or of three; the output projection reads ``heads``."""
    heads, size = 2, WIDTH // 2
    qkv, bias, out = draw_weights(1, (WIDTH, 3 * WIDTH), (3 * WIDTH,), (WIDTH, WIDTH))
    shapes = {
        "split": np.array([0, TOKENS, heads, size], np.int64),
        "merge": np.array([0, TOKENS, WIDTH], np.int64),
    }
    if packed:
        nodes = [
            node("MatMul", ["x", "qkv"], "product"),
            node("Add", ["product", "bias"], "linear"),
        ]
        split = node("Split", ["linear"], "query", axis=-1, num_outputs=3)
        split.output.extend(["key", "value"])
        nodes.append(split)
        weights = {"qkv": qkv, "bias": bias}
    else:
        nodes, weights = [], {}
        for index, name in enumerate(("query", "key", "value")):
            part = slice(index * WIDTH, (index + 1) * WIDTH)
            nodes += [
                node("MatMul", ["x", f"w_{name}"], f"m_{name}"),
                node("Add", [f"m_{name}", f"b_{name}"], name),
            ]
            weights |= {f"w_{name}": qkv[:, part].copy(), f"b_{name}": bias[part].copy()}
    for name, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        nodes.append(node("Reshape", [name, "split"], f"{name}_heads"))
        nodes.append(node("Transpose", [f"{name}_heads"], f"{name}_turned", perm=perm))
    nodes += [
        node("MatMul", ["query_turned", "key_turned"], "scores"),
        node("Softmax", ["scores"], "shares", axis=-1),
        node("MatMul", ["shares", "value_turned"], "mixed"),
        node("Transpose", ["mixed"], "turned", perm=[0, 2, 1, 3]),
        node("Reshape", ["turned", "merge"], "heads"),
        node("MatMul", ["heads", "out"], "y"),
    ]
    write_graph(tmp_path, nodes, {**weights, **shapes, "out": out})
    model = ir.load(tmp_path / "vision_encoder.onnx")
    fold = find_fold(model, find_targets(model).by_activation()["heads"])
    if packed:
        last = slice(2 * WIDTH, 3 * WIDTH)
        assert fold == (("bias", last), ("qkv", last))
    else:
        assert fold == (("b_value", EVERYTHING), ("w_value", EVERYTHING))
    x = draw_inputs(1)[0]
    exact = OnnxRuntimeSession(tmp_path / "vision_encoder.onnx", 1).run({"x": x})["y"]
    divisor = np.linspace(0.5, 2.0, WIDTH, dtype=np.float32)
    divided = {**weights}
    for name, where in fold:
        divided[name] = weights[name].copy()
        divided[name][..., where] /= divisor
    write_graph(tmp_path, nodes, {**divided, **shapes, "out": out * divisor[:, None]})
    got = OnnxRuntimeSession(tmp_path / "vision_encoder.onnx", 1).run({"x": x})["y"]
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


def test_an_observer_keeps_the_rows_that_matter_and_no_more() -> None:
    random = np.random.default_rng(7)
    observer = Observer(400, seed=0)
    for run in range(400):
        values = random.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
        if run == 333:
            values[0, 4, 9] = 500.0
        observer.update(values)
    seen = observer.result()
    drawn, largest = seen.sample()
    assert drawn.shape == (SAMPLED_TOKENS, WIDTH)
    assert largest.shape == (LARGEST_TOKENS, WIDTH)
    assert seen.channel_max[9] == 500.0
    assert largest[0, 9] == 500.0
    assert np.abs(largest[0]).max() == seen.histogram.maximum
    assert seen.histogram.counts.sum() == 400 * TOKENS * WIDTH


def test_divisions_are_scaled_to_the_median_of_one() -> None:
    random = np.random.default_rng(2)
    largest, weight = random.uniform(0.5, 30, 33).astype(np.float32), random.normal(size=(33, 8)).astype(np.float32)
    largest[5], weight[9] = 0.0, 0.0
    unused = [5, 9]
    used = np.delete(np.arange(33), unused)
    for alpha, divisor in zip(ALPHAS, _divisors(largest, weight), strict=True):
        wanted = largest[used] ** alpha / np.abs(weight[used]).max(axis=1) ** (1 - alpha)  # SmoothQuant, equation 4
        np.testing.assert_allclose(divisor[used], wanted / np.median(wanted), rtol=1e-5)
        assert np.median(np.delete(divisor, unused)) == pytest.approx(1.0, rel=1e-6)
        assert divisor[unused].tolist() == [1.0, 1.0]


def test_the_columns_of_a_wide_layer_are_spread() -> None:
    weight = np.arange(1000, dtype=np.float32)[None]
    chosen = _some_columns(weight, COLUMNS)[0]
    assert len(set(chosen)) == COLUMNS
    assert chosen[0] == 0
    assert chosen[-1] > 990
    assert np.diff(chosen).max() <= 3
    assert _some_columns(weight[:, :COLUMNS], COLUMNS).shape == (1, COLUMNS)
