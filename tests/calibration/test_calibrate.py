"""``calibrate`` from a bundle to an INT8 bundle, and the inputs that it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="the parent is exported with torch")
pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.schema import BRIDGE, DECODER, VISION
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.calibration.activations.cache import FOLDER
from blip2edge.calibration.advice import difference_warnings
from blip2edge.calibration.batches import Feeds, collect
from blip2edge.calibration.pictures import ADVISED, choose_pictures
from blip2edge.calibration.pipeline import calibrate
from blip2edge.calibration.results import CalibrationReport
from blip2edge.cli import main
from blip2edge.errors import BundleError, DataError, OutputError, UsageError
from blip2edge.runtime.bench.memory import MachineMemory
from blip2edge.runtime.captioning.captioner import Captioner
from tests.drawing import draw_pictures

PICTURES = 6
ALL = (VISION, BRIDGE, DECODER)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for at, picture in enumerate(draw_pictures(PICTURES)):
        picture.save(folder / f"{at}.png")
    return folder


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationReport:
    """All three graphs with INT8 activations."""
    output = tmp_path_factory.mktemp("calibrated") / "int8"
    return calibrate(tiny_bundle, output, images=images, activations=ALL, weights=None, threads=1)


def test_the_bundle_is_whole_and_says_how_it_was_made(report: CalibrationReport, tiny_bundle: Path) -> None:
    bundle, parent = Bundle.open(report.bundle), Bundle.open(tiny_bundle)
    bundle.verify()
    assert {name: graph.precision for name, graph in bundle.manifest.graphs.items()} == dict.fromkeys(ALL, "int8")
    record = bundle.manifest.calibration
    assert record["method"] == "smooth"
    assert record["pictures"] == PICTURES
    assert record["parent_sha256"] == parent.sha256
    assert set(record["cosine"]) == set(ALL)
    assert record["captions"]["pictures"] == PICTURES
    assert {name: spec.spec for name, spec in bundle.manifest.graphs.items()} == {
        name: spec.spec for name, spec in parent.manifest.graphs.items()
    }
    data = json.loads((report.bundle / "report.json").read_text())
    assert {len(graph["headroom"]["tensors"]) > 20 for graph in data["graphs"].values()} == {True}
    assert [path.name for path in report.bundle.parent.iterdir()] == [report.bundle.name]


def test_every_graph_stays_near_its_parent(report: CalibrationReport) -> None:
    for name, graph in report.graphs.items():
        assert graph.products > 0
        assert min(value.mean for value in graph.cosine.values()) > 0.995, name


def test_it_captions(report: CalibrationReport, tiny_bundle: Path, images: Path) -> None:
    """Random weights let few captions stand; the first token's logits decide more than the text does."""
    ours, parent = (Captioner.load(path, backend="cpu", threads=1) for path in (report.bundle, tiny_bundle))
    results = [list(one.caption_many(sorted(images.iterdir()))) for one in (ours, parent)]
    firsts = [[result.tokens[0] for result in rows] for rows in results]
    assert np.mean([one == two for one, two in zip(*firsts, strict=True)]) >= 0.5


def test_the_decoder_is_calibrated_on_captions(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    bundle, feeds = Bundle.open(tiny_bundle), Feeds(tmp_path / "feeds")
    texts = [(5, 6, 7), (8, 9)]
    collect(bundle, choose_pictures(images), feeds, texts=texts, threads=1)
    assert [feeds.count(name) for name in ALL] == [PICTURES, PICTURES, 2]
    (queries,) = {feed["inputs_embeds"].shape[1] - len(texts[at]) for at, feed in enumerate(feeds.runs(DECODER))}
    assert queries == 5 + 1  # the visual tokens and the BOS of an empty prompt
    assert [feed["image_embeds"].shape[0] for feed in feeds.runs(BRIDGE, 2)] == [1, 1]


def test_the_cache_spares_the_runs_and_changes_nothing(
    report: CalibrationReport, tiny_bundle: Path, images: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    again = calibrate(
        tiny_bundle,
        tmp_path / "again",
        images=images,
        activations=ALL,
        weights=None,
        threads=1,
        progress=lambda stage, done, total: stages.append(stage),
    )
    fresh = any(stage.endswith(": ranges") for stage in stages)
    stages.clear()
    calibrate(
        tiny_bundle,
        tmp_path / "third",
        images=images,
        activations=ALL,
        weights=None,
        threads=1,
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert not any(stage.endswith(": ranges") for stage in stages), f"the cache is not read (fresh: {fresh})"
    files = [Bundle.open(path).manifest.graphs for path in (report.bundle, again.bundle, tmp_path / "third")]
    hashes = [
        {name: Bundle.open(path).manifest.files[f"{name}.onnx.data"].sha256 for name in files[0]}
        for path in (report.bundle, again.bundle, tmp_path / "third")
    ]
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_broken_cache_is_told_of_and_written_anew(
    tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options: dict[str, Any] = {"images": images, "activations": (BRIDGE,), "weights": None, "threads": 1}
    calibrate(tiny_bundle, tmp_path / "first", **options)
    (cache,) = (cache_directory() / FOLDER).glob("bridge-*.npz")
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    second = calibrate(tiny_bundle, tmp_path / "second", **options)
    (line,) = [line for line in second.warnings if "cache" in line]
    assert str(cache) in line
    assert "\n" not in line
    assert cache.read_bytes() == whole


def test_few_pictures_are_told_with_their_number(report: CalibrationReport) -> None:
    assert report.warnings[0].startswith(f"at least {ADVISED} calibration pictures are advised, got {PICTURES}")


def test_large_difference_from_the_parent_is_a_warning(report: CalibrationReport) -> None:
    assert report.captions is not None
    low, high = replace(report.captions, same=0.5), replace(report.captions, same=0.95)
    (warning,) = difference_warnings(report.graphs, low, limited=False)
    expected = f"only 50.0% of {PICTURES} captions are the same as the original bundle's; report.html shows"
    assert warning.startswith(expected)
    assert "drop limit" in warning
    assert "drop limit" not in difference_warnings(report.graphs, low, limited=True)[0]
    assert difference_warnings(report.graphs, high, limited=False) == []
    graph = report.graphs[VISION]
    far = {"image_embeds": replace(graph.cosine["image_embeds"], mean=0.9)}
    (warning,) = difference_warnings({VISION: replace(graph, cosine=far)}, None, limited=False)
    assert warning.endswith("below 0.99: vision_encoder: image_embeds 0.9000")
    assert difference_warnings({VISION: graph}, None, limited=False) == []


def test_graphs_whose_activations_cannot_become_int8(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8_activations to be one of vision_encoder, bridge, decoder, got decodr"):
        calibrate(tiny_bundle, tmp_path / "int8", images=images, activations=("decodr",))


def test_no_pictures_and_a_wrong_parent(
    tiny_bundle: Path, images: Path, report: CalibrationReport, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "bundle"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none"):
        calibrate(tiny_bundle, output, images=tmp_path / "empty")
    with pytest.raises(BundleError, match="is already calibrated"):
        calibrate(report.bundle, output, images=images)
    with pytest.raises(UsageError, match="expected method to be one of"):
        calibrate(tiny_bundle, output, images=images, method="best")
    with pytest.raises(OutputError, match="exists"):
        calibrate(tiny_bundle, report.bundle, images=images)
    with pytest.raises(BundleError, match="bundle"):
        calibrate(tmp_path / "absent", output, images=images)
    assert not list((tmp_path / "out").glob("*"))


def test_a_parent_in_bf16_is_refused(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bf16")
    path = tmp_path / "bf16" / MANIFEST
    path.write_text(path.read_text().replace('"precision": "fp32",\n  "verify"', '"precision": "bf16",\n  "verify"'))
    with pytest.raises(BundleError, match="is in bf16"):
        calibrate(tmp_path / "bf16", tmp_path / "out", images=images)


def test_what_fails_leaves_nothing(
    tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blip2edge.calibration.activations.quantize.insert_qdq", full)
    with pytest.raises(OutputError, match="the disk is full"):
        calibrate(tiny_bundle, tmp_path / "out" / "bundle", images=images, threads=1)
    assert not list((tmp_path / "out").iterdir())


def test_the_command_and_inspect(
    tiny_bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "int8"
    words = ["calibrate", str(tiny_bundle), "-o", str(output), "--images", str(images), "--method", "entropy"]
    assert main([*words, "--weights", "none", "--threads", "1", "--no-optimize"]) == 0
    told = capsys.readouterr()
    assert f"calibration pictures are advised, got {PICTURES}" in told.err
    assert "same caption as the original bundle" in told.out
    assert f"{output / 'report.html'}: every layer" in told.out
    assert told.out.splitlines()[-2:] == [
        f"next: blip2edge caption IMAGE -b {output}",
        f"next: blip2edge bench {output}",
    ]
    assert main(["inspect", str(output), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "entropy, on 6 pictures" in shown
    assert main([*words, "--threads", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_attention_products_are_floats(report: CalibrationReport) -> None:
    for name in ALL:
        graph = onnx.load(str(report.bundle / f"{name}.onnx"), load_external_data=False).graph
        made = {output: entry.op_type for entry in graph.node for output in entry.output}
        products = [[made.get(given, "") for given in entry.input] for entry in graph.node if entry.op_type == "MatMul"]
        attention = [kinds for kinds in products if kinds[1] != "DequantizeLinear"]
        assert len(attention) >= 4
        assert not any("DequantizeLinear" in kinds for kinds in attention)


def test_a_machine_with_too_little_memory(
    tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops before anything is written; with `anyway` it goes on after a warning."""
    monkeypatch.setattr("blip2edge.runtime.bench.memory.machine_memory", lambda: MachineMemory(1000, 2000))
    said: list[str] = []
    with pytest.raises(BundleError, match=r"the calibration needs at least .* try it with anyway=True"):
        calibrate(tiny_bundle, tmp_path / "new", images=images, notify=said.append)
    with pytest.raises(DataError):
        calibrate(tiny_bundle, tmp_path / "new", images=tmp_path / "none", anyway=True, notify=said.append)
    assert [line.partition(" may")[0] for line in said] == ["warning: the calibration"]
