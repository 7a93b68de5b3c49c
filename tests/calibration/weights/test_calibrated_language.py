"""Calibrates a tiny BLIP-2 with INT4 weights and ``--drop-limit``, and checks the report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="the parent is exported with torch")
pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.bundle.token_table import TokenTable
from blip2edge.calibration.pipeline import calibrate
from blip2edge.calibration.report.page import report_page, shown_pictures
from blip2edge.calibration.results import CalibrationReport
from blip2edge.runtime.captioning.captioner import Captioner
from tests.drawing import draw_pictures

PICTURES = 4
LIMIT = 25  # percent points: one picture


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for at, picture in enumerate(draw_pictures(PICTURES)):
        picture.save(folder / f"{at}.png")
    return folder


@pytest.fixture(scope="module")
def int4(tiny_bundle: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationReport:
    """Random weights suffer: the limit leaves some layers."""
    output = tmp_path_factory.mktemp("calibrated") / "int4"
    return calibrate(tiny_bundle, output, images=pictures, method="minmax", weights="int4", drop_limit=LIMIT, threads=1)


@pytest.fixture(scope="module")
def int8(tiny_bundle: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("calibrated") / "int8"
    calibrate(tiny_bundle, output, images=pictures, weights="int8", activations=(), threads=1)
    return Bundle.open(output)


def test_the_limit_holds_and_the_record_says_which(int4: CalibrationReport) -> None:
    bundle = Bundle.open(int4.bundle)
    record: Any = bundle.manifest.calibration["sensitivity"]
    assert int4.captions is not None
    assert 100 * (1 - int4.captions.same) == pytest.approx(record["drop"])
    tried = {int(left): drop for left, drop in record["tried"].items()}
    assert record["drop"] == tried[len(record["left"])] <= LIMIT < tried[len(record["left"]) - 1]
    losses = [item["loss"] for item in record["layers"]]
    assert losses == sorted(losses, reverse=True)
    assert record["left"] == record["layers"][: len(record["left"])]
    assert {item["graph"] for item in record["layers"]} == {"vision_encoder", "bridge", "decoder"}
    left = {
        weight: reason
        for graph in int4.graphs.values()
        for weight, reason in graph.kept_float.items()
        if "drop limit" in reason
    }
    assert bool(left) == bool(record["left"])


def test_what_was_left_is_the_parents(int4: CalibrationReport, tiny_bundle: Path) -> None:
    left = [w for w, reason in int4.graphs[DECODER].kept_float.items() if "drop limit" in reason]
    graph = onnx.load(int4.bundle / "decoder.onnx")
    names = {tensor.name: tensor for tensor in graph.graph.initializer}
    parent = {tensor.name: tensor for tensor in onnx.load(tiny_bundle / "decoder.onnx").graph.initializer}
    for weight in left:
        assert np.array_equal(onnx.numpy_helper.to_array(names[weight]), onnx.numpy_helper.to_array(parent[weight]))
    for weight in int4.graphs[DECODER].matrices:
        assert weight not in names
        assert names[f"{weight}.int4"].data_type == onnx.TensorProto.INT4


def test_a_tied_head_and_the_table_are_one(int8: Bundle, tiny_bundle: Path, pictures: Path) -> None:
    record = int8.graph(DECODER)
    assert record.precision == "int8-weights"
    assert record.data_files == ("decoder.onnx.data", "embed_tokens.safetensors")
    places = {
        entry.value
        for tensor in onnx.load(int8.file("decoder.onnx"), load_external_data=False).graph.initializer
        if tensor.name.startswith("language.head")
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"embed_tokens.safetensors"}
    tables = [
        TokenTable(path / "embed_tokens.safetensors", "embed_tokens", "float32") for path in (int8.path, tiny_bundle)
    ]
    rows = [table.rows(range(table.num_rows)) for table in tables]
    assert rows[0].shape == rows[1].shape
    assert np.linalg.norm(rows[0] - rows[1]) < 0.01 * np.linalg.norm(rows[1])
    texts = [
        Captioner.load(path, threads=1).caption(pictures / "0.png", max_new_tokens=4).text
        for path in (int8.path, tiny_bundle)
    ]
    assert texts[0] == texts[1]


def test_an_int8_language_model_stays_near(int8: Bundle) -> None:
    cosine = int8.manifest.calibration["cosine"][DECODER]["logits"]
    assert cosine["mean"] > 0.999


class Page(HTMLParser):
    """What a page refers to, and whether its tags match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers += [str(value) for key, value in attrs if key in ("src", "href", "data", "action")]
        if tag not in ("meta", "img", "th", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "path", "th"):
            return
        assert self.open.pop() == tag


def test_the_report_needs_no_network(int4: CalibrationReport) -> None:
    text = (int4.bundle / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    assert "script" not in found.tags
    assert found.tags.count("img") == PICTURES
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in found.refers)
    assert not re.findall(r"url\(|@import|https?://", text)
    for word in ("Size", "Captions compared", "Sensitivity", "FP16 headroom", "decoder"):
        assert word in text


def test_the_reports_data(int4: CalibrationReport) -> None:
    values = json.loads((int4.bundle / "report.json").read_text(encoding="utf-8"))
    assert [entry["picture"] for entry in values["captions"]] == [f"{at}.png" for at in range(PICTURES)]
    decode = values["decode"]
    size = (int4.bundle / "decoder.onnx.data").stat().st_size
    assert decode["weight_bytes"] == size
    assert decode["bytes"] == size + decode["positions"] * decode["cache_bytes_per_position"]
    assert values["token_table"]["bytes"] == (int4.bundle / "embed_tokens.safetensors").stat().st_size
    for graph in values["graphs"].values():
        assert graph["headroom"]["tensors"]
    told = values["graphs"]["decoder"]["weights"]
    assert told.keys() == int4.graphs[DECODER].matrices.keys()
    assert all(matrix["bits"] == 4 and matrix["block"] in (16, 32) for matrix in told.values())


def test_captions_that_differ_come_first_and_are_escaped(int4: CalibrationReport) -> None:
    values = json.loads((int4.bundle / "report.json").read_text(encoding="utf-8"))
    for pair in values["captions"]:
        pair["ours"] = pair["parent"]
    values["captions"][3]["ours"] = "<b>two & a half</b>"
    assert shown_pictures(values["captions"])[0] == 3
    text = report_page(values, "a <title>", {})
    assert f"1 of {PICTURES} captions differ" in text
    assert "&lt;b&gt;two &amp; a half&lt;/b&gt;" in text
    assert "<h1>a &lt;title&gt;</h1>" in text
    assert Page(text).open == []


def test_weights_that_are_left_alone(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    report = calibrate(
        tiny_bundle,
        tmp_path / "out",
        images=pictures,
        weights=None,
        activations=("vision_encoder",),
        threads=1,
    )
    assert report.graphs[DECODER].precision == "fp32"
    for name in ("decoder.onnx.data", "embed_tokens.safetensors"):
        assert (report.bundle / name).read_bytes() == (tiny_bundle / name).read_bytes()


def test_the_manifest_tells_of_the_weights(int8: Bundle, int4: CalibrationReport) -> None:
    told = int8.manifest.calibration["weights"][DECODER]
    assert told["bits"] == 8
    assert sum(told["blocks"].values()) == len(report_of(int8)["graphs"][DECODER]["weights"])
    assert 0 < told["error"] < told["plain_error"] < 0.02
    assert Bundle.open(int4.bundle).manifest.calibration["weights"].keys() <= {DECODER}


def report_of(bundle: Bundle) -> Any:
    return json.loads(bundle.file("report.json").read_text(encoding="utf-8"))
