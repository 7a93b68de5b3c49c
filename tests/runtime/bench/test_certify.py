"""`certify`: every backend gives the recorded outputs, and a wrong kernel is found in every graph."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("torch", reason="export needs torch")
pytest.importorskip("onnx_ir", reason="graphs are changed with onnx_ir")

import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import BackendName
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.pipeline import calibrate
from blip2edge.cli import main
from blip2edge.errors import BundleError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.backends import onnxruntime_cuda
from blip2edge.runtime.bench.certificate import reference_outputs
from blip2edge.runtime.bench.certificate.certify import certify
from blip2edge.runtime.bench.certificate.reference_outputs import (
    REFERENCE_OUTPUTS,
    ReferenceOutputs,
    deviation,
    draw_pictures,
    run_graphs,
    sketch,
)
from tests.drawing import Drawn
from tests.runtime.backends.test_device_arrays import on_the_cpu
from tests.side_file_kinds import KINDS

record = reference_outputs.add_reference_outputs
"""The function itself; it does nothing in other tests."""


def recorded(source: Path, target: Path) -> Path:
    """A copy of a bundle, with references."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("optimized"))
    record(target, threads=1)
    return target


@pytest.fixture(scope="module")
def certified_once(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tiny_bundle, tmp_path_factory.mktemp("certified") / "bundle")


@pytest.fixture
def bundle(certified_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(certified_once, tmp_path / "bundle"))


def update(bundle: Path, name: str) -> None:
    """Lists a changed file in the manifest."""
    path = bundle / "bundle.json"
    values = json.loads(path.read_text())
    values["files"][name] = vars(FileRecord.of(bundle / name))
    path.write_text(json.dumps(values))


def plant(bundle: Path, graph: str, factor: float = 1.02) -> None:
    """Makes one product in the middle of a graph wrong: scaled, and shifted because a norm removes a scale alone."""
    path = bundle / f"{graph}.onnx"
    model = ir.load(path)
    products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    node = products[len(products) // 2]
    result = node.outputs[0]
    wrong = ir.Value(name=f"{result.name}.wrong", type=result.type, shape=result.shape)
    numbers = {"wrong.factor": factor, "wrong.shift": 5 * (factor - 1)}
    for name, number in numbers.items():
        tensor = ir.tensor(np.array(number, np.float32), name=name)
        model.graph.initializers[name] = ir.Value(name=name, const_value=tensor)
    users = list(result.uses())
    scale, shift = (model.graph.initializers[name] for name in numbers)
    scaled = ir.Node("", "Mul", [result, scale])
    shifted = ir.Node("", "Add", [scaled.outputs[0], shift], outputs=[wrong])
    for user, at in users:
        user.replace_input_with(at, wrong)
    model.graph.insert_after(node, [scaled, shifted])
    if result in model.graph.outputs:
        model.graph.outputs[list(model.graph.outputs).index(result)] = wrong
        result.name, wrong.name = f"{result.name}.right", result.name
    ir.save(model, path)
    update(bundle, path.name)


def test_a_sketch_estimates_a_deviation() -> None:
    rng = np.random.default_rng(0)
    for size in (10, 1000, 100_000):
        wanted = rng.standard_normal(size).astype(np.float32)
        for share in (1e-5, 1e-2, 0.5):
            noise = rng.standard_normal(size)
            got = wanted + share * noise * np.linalg.norm(wanted) / np.linalg.norm(noise)
            assert deviation(sketch(got), sketch(wanted)) == pytest.approx(share, rel=0.4)
    plain = rng.standard_normal(1000).astype(np.float32)
    single = plain.copy()
    single[77] += 5.0
    assert deviation(sketch(single), sketch(plain)) == pytest.approx(5.0 / np.linalg.norm(plain), rel=0.4)
    assert deviation(sketch(np.array([1.0, np.nan])), sketch(np.ones(2))) == np.inf
    assert deviation(sketch(np.zeros(3)), sketch(np.zeros(3))) == 0.0
    assert deviation(sketch(np.ones(3)), sketch(np.zeros(3))) == np.inf


def test_drawn_pictures_do_not_change() -> None:
    """Reference outputs of older bundles are made of them."""
    content = b"".join(picture.tobytes() for picture in draw_pictures())
    assert hashlib.sha256(content).hexdigest()[:16] == "ba585b5ca1f83327"


def test_export_and_calibrate_record(small: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_outputs, "add_reference_outputs", record)
    parent = export_checkpoint(small.directory, tmp_path / "bundle").bundle
    images = tmp_path / "images"
    images.mkdir()
    for number, picture in enumerate(draw_pictures()):
        PIL.Image.fromarray(picture).save(images / f"{number}.png")
    child = calibrate(parent, tmp_path / "int8", images=images, threads=1).bundle
    assert not (child / ".verified.json").exists()
    before, after = (ReferenceOutputs.read(Bundle.open(path)) for path in (parent, child))
    assert before is not None
    assert after is not None
    assert before.outputs.keys() == after.outputs.keys()
    differences = [deviation(after.outputs[name], before.outputs[name]) for name in before.outputs]
    assert max(differences) > 1e-4  # those of INT8, not of the parent
    for path in (parent, child):
        assert certify(path, backend="cpu", threads=1).faults == []


def test_a_bundle_without_reference_outputs(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no reference outputs"):
        certify(tiny_bundle)


@pytest.mark.parametrize("backend", ["cpu", "openvino", "cuda", "tensorrt"])
def test_the_references_hold(backend: BackendName, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="pip install 'blip2edge[openvino]'")
    if backend == "cuda":
        monkeypatch.setattr(onnxruntime_cuda, "open_graph", on_the_cpu)
    if backend == "tensorrt":
        from blip2edge.runtime.backends.engine_files import KIND
        from tests.engine.fake_engines import plug_in, write_engines

        plug_in(monkeypatch)
        write_engines(bundle, bundle / KIND)
    found = certify(bundle, backend=backend, threads=1)
    assert found.faults == []
    assert found.backend == backend
    assert found.captions == (4, 4)
    assert found.tokens[0] == found.tokens[1] > 16
    assert [one.graph for one in found.graphs] == list(Bundle.open(bundle).manifest.graphs)
    assert set(found.timings_ms) == {"preprocess", "vision", "bridge", "prefill", "decode", "total"}


def test_an_optimized_copy_is_what_is_checked(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize(bundle)
    outputs = {name: set(made) for name, _, made in run_graphs(Bundle.open(bundle), "cpu", 1)}
    logits = {f"logits of {kind}" for kind in ("prefill", "step", "extend", "after")}
    assert outputs["decoder"] == logits
    found = certify(bundle, backend="cpu", threads=1)
    assert found.faults == []
    (decoder,) = (one for one in found.graphs if one.graph == "decoder")
    assert {one.output for one in decoder.outputs} == logits
    assert "present.0.key" in decoder.not_compared


@pytest.mark.parametrize("graph", ["vision_encoder", "bridge", "decoder"])
def test_a_wrong_kernel_is_found(graph: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(bundle, graph)
    assert main(["certify", str(bundle), "--backend", "cpu", "--threads", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {one["graph"] for one in found["graphs"] if one["first_beyond"]} == {graph}
    assert found["held"] is False
    assert found["faults"][0].startswith(f"{graph}: ")


def test_a_wrong_layer_is_named(bundle: Path) -> None:
    """The keys and values of the layers before the wrong product are right."""
    plant(bundle, "decoder")
    (decoder,) = (one for one in certify(bundle, backend="cpu", threads=1).graphs if one.graph == "decoder")
    held = {one.output: one.held for one in decoder.outputs}
    assert held["present.0.key"]
    assert not held["logits of prefill"]
    assert decoder.first_beyond == next(name for name, fine in held.items() if not fine)


def test_limits(bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plant(bundle, "decoder", 1.1)
    path = tmp_path / "certificate.json"
    words = ["certify", str(bundle), "--backend", "cpu", "--threads", "1", "--tolerance", "1"]
    assert main([*words, "--min-equal", "0", "--output", str(path)]) == 0
    assert "certified: " in capsys.readouterr().out
    assert main([*words, "--min-equal", "0", "--output", "/dev/full"]) == 1
    output = capsys.readouterr()
    assert "certified: " in output.out
    assert "the disk is full" in output.err
    found = json.loads(path.read_text())
    assert found["tokens"]["equal"] < found["tokens"]["all"]
    assert main([*words, "--min-equal", "1"]) == 1
    assert f"fault: {found['tokens']['equal']} of {found['tokens']['all']} tokens are equal" in capsys.readouterr().out
    with pytest.raises(UsageError, match="min_equal from 0 to 1, got 2"):
        certify(bundle, min_equal=2)


@pytest.mark.parametrize("change", ["inputs", "outputs", "bins", "sketch", "tokens"])
def test_references_that_do_not_fit(change: str, bundle: Path) -> None:
    path = bundle / REFERENCE_OUTPUTS
    values: dict[str, Any] = json.loads(path.read_text())
    if change == "inputs":
        values["inputs"] = dict.fromkeys(values["inputs"], next(iter(values["outputs"].values())))
    elif change == "outputs":
        values["outputs"] = {key: text for key, text in values["outputs"].items() if not key.startswith("bridge/")}
    elif change == "bins":
        values["bins"] = 32
    elif change == "sketch":
        values["outputs"] = dict.fromkeys(values["outputs"], "AAAA")
    else:
        values["tokens"] = [["a"]]
    path.write_text(json.dumps(values))
    update(bundle, REFERENCE_OUTPUTS)
    expected = {"inputs": "random inputs of vision_encoder", "outputs": "no reference outputs of the graph bridge"}.get(
        change, r"reference_outputs\.json cannot be read"
    )
    with pytest.raises(BundleError, match=expected):
        certify(bundle, backend="cpu", threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    """The references of every family hold, and those of its optimized copy; a wrong kernel is found in each graph."""
    KINDS[name].save(tmp_path / "checkpoint")
    exported = export_checkpoint(tmp_path / "checkpoint", tmp_path / "exported", verify="sample").bundle
    bundle = recorded(exported, tmp_path / "bundle")
    assert certify(bundle, backend="cpu", threads=1).faults == []
    wrong = Path(shutil.copytree(bundle, tmp_path / "wrong"))
    planted = list(Bundle.open(bundle).manifest.graphs)
    for graph in planted:
        plant(wrong, graph, 1.1)
    found = [one.graph for one in certify(wrong, backend="cpu", threads=1).graphs if one.first_beyond is not None]
    print(f"{name}: {len(found)} of {len(planted)} wrong graphs are found")  # docs/certify.md has the sum
    assert found == planted
    optimize(bundle)
    assert certify(bundle, backend="cpu", threads=1).faults == []
