"""The openvino backend gives the cpu backend's ids in fp32, from the bundle and from its compiled copy."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="pip install 'blip2edge[openvino]'")
pytest.importorskip("torch", reason="the bundles are exported here")
pytest.importorskip("onnxruntime", reason="the other backend")

from blip2edge import Captioner
from blip2edge.errors import BackendError, BundleError, BundleIntegrityError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.optimization import compiled as compiled_module
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.backends import optimized_copy
from blip2edge.runtime.backends.base import OptimizedFile
from blip2edge.runtime.backends.openvino import OpenVinoSession, open_graph
from blip2edge.runtime.backends.optimized_copy import RECORD
from tests.drawing import Drawn, draw_pictures
from tests.families.drawing_blip import save_blip
from tests.families.drawing_idefics import draw_idefics
from tests.families.drawing_instruct import draw_instructblip
from tests.families.drawing_llama import draw_blip2

FAMILIES: dict[str, Callable[[Path], object]] = {
    "llama": lambda directory: draw_blip2(directory, 1),
    "t5": lambda directory: draw_instructblip(directory, 0, "t5"),
    "bert": lambda directory: save_blip(directory, "caption", 0),
    "idefics": lambda directory: draw_idefics(directory, 2),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3, "min_new_tokens": 4, "repetition_penalty": 1.3},
    {"temperature": 1.2, "seed": 5},
)
PROMPTS = ("a photo of", "red dog", "what is it ?")


@pytest.fixture(
    scope="module",
    params=[
        "opt",
        "t5",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bert", "idefics")),
    ],
)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "opt":
        found: Path = request.getfixturevalue("tiny_bundle")
        return found
    directory = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](directory / "checkpoint")
    return export_checkpoint(directory / "checkpoint", directory / "bundle").bundle


def ids(captioner: Captioner, **options: Any) -> list[tuple[int, ...]]:
    pictures: list[Any] = list(draw_pictures(3, 6))
    found = captioner.caption_many(pictures, prompts=PROMPTS, batch_size=3, max_new_tokens=8, **options)
    return [one.tokens for one in found]


def test_the_ids_of_the_cpu_backend(bundle: Path) -> None:
    there = Captioner.load(bundle, backend="openvino", threads=1)
    here = Captioner.load(bundle, backend="cpu", threads=1)
    assert not there.graphs.copied
    wanted = [ids(here, **options) for options in OPTIONS]
    assert len(set(wanted[0])) > 1
    assert [ids(there, **options) for options in OPTIONS] == wanted


def test_the_ids_of_the_compiled_copy(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever opening takes here: the copy of every graph is taken."""
    monkeypatch.setattr("blip2edge.optimization.pipeline.SOONER", np.inf)
    own = shutil.copytree(bundle, tmp_path / "bundle")
    report = optimize(own, "openvino")
    assert report.record.left == {}
    assert all((graph.cosine or 0.0) > 0.99999 for graph in report.record.graphs.values())
    assert all(
        parity.relative <= parity.tolerance < 1e-3 for graph in report.record.graphs.values() for parity in graph.parity
    )
    fast = Captioner.load(own, backend="openvino", threads=1)
    assert set(fast.graphs.copied) >= {"vision_encoder", "decoder"}
    here = Captioner.load(bundle, backend="cpu", threads=1)
    for options in OPTIONS:
        assert ids(fast, **options) == ids(here, **options)


def test_bf16_runs(tiny_checkpoint: Drawn, tiny_bundle: Path, tmp_path: Path) -> None:
    """Weights, inputs and outputs of the graphs are bf16; arrays are float32, also of a compiled graph."""
    path = export_checkpoint(tiny_checkpoint.directory, tmp_path / "bundle", precision="bf16").bundle
    captions = ids(Captioner.load(path, backend="openvino", threads=1))
    assert len(set(captions)) > 1
    inputs = {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)}
    rounded, exact = (open_graph(bundle / "vision_encoder.onnx", 1) for bundle in (path, tiny_bundle))
    found, wanted = (session.run(inputs)["image_embeds"] for session in (rounded, exact))
    assert found.dtype == np.float32
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.05  # 8 bits of mantissa
    blob = tmp_path / "vision_encoder.blob"
    blob.write_bytes(rounded.export())
    compiled = open_graph(blob, 1, OptimizedFile(path)).run(inputs)["image_embeds"]
    np.testing.assert_allclose(compiled, found, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def copied(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("compiled") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blip2edge.optimization.pipeline.SOONER", np.inf)
        optimize(own, "openvino")
    return own


def test_a_copy_does_not_need_the_portable_graph(copied: Path) -> None:
    blob = copied / "optimized" / "openvino" / "vision_encoder.blob"
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    portable = open_graph(copied / "vision_encoder.onnx", 1)
    lonely = shutil.copy(blob, copied.parent / "alone.blob")
    compiled = open_graph(Path(lonely), 2, OptimizedFile(copied))
    assert compiled.input_names == portable.input_names
    assert compiled.output_names == portable.output_names
    wanted = portable.run({"pixel_values": pixels})["image_embeds"]
    for _ in range(2):
        np.testing.assert_allclose(compiled.run({"pixel_values": pixels})["image_embeds"], wanted, rtol=1e-4, atol=1e-5)
    compiled.close()


@pytest.mark.parametrize("fact", ["processor", "openvino"])
def test_a_copy_of_another_processor_or_version_is_passed_over(
    copied: Path, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Captioner.load(copied, backend="openvino", threads=1).graphs.copied
    if fact == "processor":
        monkeypatch.setattr(optimized_copy, "exact_processor", lambda: "another")
    else:
        monkeypatch.setattr(optimized_copy, "installed", lambda package: "0.1")
    assert not Captioner.load(copied, backend="openvino", threads=1).graphs.copied


def test_a_changed_copy_names_its_own_command(copied: Path, tmp_path: Path) -> None:
    own = shutil.copytree(copied, tmp_path / "bundle")
    blob = own / "optimized" / "openvino" / "decoder.blob"
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=r"optimize .* --backend openvino"):
        Captioner.load(own, backend="openvino", threads=1)


def test_a_graph_that_opens_no_sooner_stays_portable(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = compiled_module.compile_to
    monkeypatch.setattr("blip2edge.optimization.pipeline.compile_to", lambda *paths: (written(*paths), (10.0, 9.9))[1])
    own = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    report = optimize(own, "openvino")
    assert report.record.graphs == {}
    assert all("opens as fast" in why for why in report.record.left.values())
    assert os.listdir(report.directory) == [RECORD]
    assert json.loads((report.directory / RECORD).read_text())["files"] == {}


@pytest.mark.parametrize("compiled", [False, True])
def test_what_it_cannot_load_is_refused_in_a_line(tmp_path: Path, compiled: bool) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph" * 100)
    with pytest.raises(BundleError, match=r"OpenVINO cannot load .*broken") as caught:
        OpenVinoSession(broken, 1, compiled=compiled)
    assert "\n" not in str(caught.value)


def test_one_graph_that_it_cannot_load_is_left_alone(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that it has compiled of the bridge is broken: the other graphs have their copies all the same."""
    export = OpenVinoSession.export

    def broken(session: OpenVinoSession) -> bytes:
        return b"no blob" * 100 if "image_embeds" in session.input_names else export(session)

    monkeypatch.setattr("blip2edge.optimization.pipeline.SOONER", np.inf)
    monkeypatch.setattr(OpenVinoSession, "export", broken)
    own = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    report = optimize(own, "openvino")
    assert set(report.record.left) == {"bridge"}
    assert "OpenVINO cannot load" in report.record.left["bridge"]
    assert not (report.directory / "bridge.blob").exists()
    assert {"vision_encoder", "decoder"} <= set(report.record.graphs)
    captioner = Captioner.load(own, backend="openvino", threads=1)
    assert "bridge" not in captioner.graphs.copied
    assert captioner.caption(draw_pictures(1)[0], max_new_tokens=2).tokens


def test_an_older_openvino_that_takes_no_tensor_is_refused_in_a_line(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    def refuses(*_: object) -> None:
        raise TypeError("import_model(): incompatible function arguments.\nThe following are supported: …")

    monkeypatch.setattr(openvino.Core, "import_model", refuses)
    with pytest.raises(BundleError, match=r"OpenVINO cannot load .*incompatible function arguments") as caught:
        OpenVinoSession(copied / "optimized" / "openvino" / "decoder.blob", 1, compiled=True)
    assert "\n" not in str(caught.value)


def test_without_the_package(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    own = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    for run in (lambda: Captioner.load(own, backend="openvino"), lambda: optimize(own, "openvino")):
        with pytest.raises(BackendError, match=r"blip2edge\[openvino\]"):
            run()
    assert not (own / "optimized").exists() or not any((own / "optimized").iterdir())
