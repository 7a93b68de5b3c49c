"""The command ``explain``: its files, its JSON object, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import MANIFEST, MergingRecord
from blip2edge.cli import main
from blip2edge.explanation.pipeline import explain
from blip2edge.export.pipeline import export_checkpoint
from tests.drawing import draw_pictures
from tests.families import drawing_blip, drawing_llama


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for at, picture in enumerate(draw_pictures(3)):
        picture.save(folder / f"{at}.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (50, 30), (9, 200, 30)).save(folder / "turned <b>.png", exif=exif)
    return folder


def words(bundle: Path, out: Path, *more: str) -> list[str]:
    return ["explain", "-b", str(bundle), "-o", str(out), "--threads", "1", *more]


def test_files_page_and_json(
    tiny_bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(words(tiny_bundle, out, str(pictures), "--json", "--maps", "2")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "explain.json").read_text(encoding="utf-8"))
    assert (document["layers"], document["queries"], document["heads"]) == ([0], 5, 3)
    assert [picture["shown"] for picture in document["pictures"]] == [True, True, False, False]
    turned = document["pictures"][-1]
    assert (turned["width"], turned["height"]) == (30, 50)
    for picture in document["pictures"]:
        for query in picture["layers"][0]["queries"]:
            left, top, right, bottom = query["peak"]
            assert 0 <= left < right <= picture["width"]
            assert 0 <= top < bottom <= picture["height"]
            assert 0 < query["weight"] <= 1 <= query["spread"] <= 16
    assert np.shape(document["similarity"]["matrix"]) == (5, 5)
    assert document["similarity"]["pictures"] == 4
    files = {path.name for path in out.iterdir()}
    shown = {layer["file"] for picture in document["pictures"][:2] for layer in picture["layers"]}
    assert files == {"explain.json", "explain.html", "similarity.png"} | shown
    for name in shown | {"similarity.png"}:
        PIL.Image.open(out / name).verify()
    page = (out / "explain.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 3
    assert not re.findall(r"(?:src|href)=(?!\"data:)", page)
    assert "<script" not in page


def test_a_broken_picture_does_not_end_the_command(
    tiny_bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken <i>.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    several = [str(tmp_path / "broken <i>.png"), str(pictures / "0.png"), str(pictures / "turned <b>.png")]
    assert main(words(tiny_bundle, out, *several)) == 1
    told = capsys.readouterr()
    assert "broken <i>.png: not a picture" in told.err
    assert "of 16" in told.out
    assert told.out.splitlines()[-1] == str(out / "explain.html")
    page = (out / "explain.html").read_text(encoding="utf-8")
    assert "turned &lt;b&gt;.png" in page
    assert "turned <b>" not in page
    document = json.loads((out / "explain.json").read_text(encoding="utf-8"))
    assert [Path(each["image"]).name for each in document["pictures"]] == ["0.png", "turned <b>.png"]
    assert [Path(each["image"]).name for each in document["broken"]] == ["broken <i>.png"]
    assert "not a picture" in document["broken"][0]["error"]
    assert "Skipped pictures" in page
    assert "1 of 3 pictures could not be read" in page
    assert "broken &lt;i&gt;.png" in page
    assert main(words(tiny_bundle, out, str(pictures))) == 1
    assert "exists" in capsys.readouterr().err
    assert main(words(tiny_bundle, out, str(pictures), "--force")) == 0
    assert json.loads((out / "explain.json").read_text(encoding="utf-8"))["broken"] == []
    assert "Skipped pictures" not in (out / "explain.html").read_text(encoding="utf-8")
    assert main(words(tiny_bundle, tmp_path / "none", str(tmp_path / "broken <i>.png"))) == 1
    assert "error: " in (alone := capsys.readouterr().err)
    assert "pictures can be read" not in alone
    all_broken = [tmp_path / f"{number}.png" for number in range(5)]
    for path in all_broken:
        path.write_bytes(b"no picture")
    assert main(words(tiny_bundle, tmp_path / "none", *map(str, all_broken))) == 1
    error = capsys.readouterr().err
    assert "error: none of the 5 pictures can be read: " in error
    assert [path.name in error for path in all_broken] == [True] * 3 + [False] * 2
    assert " and 2 more; give other pictures" in error
    assert not (tmp_path / "none").exists()


def test_a_name_that_is_no_text(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    """Bytes of a file name that are not UTF-8 can stand in no JSON or HTML file as they are."""
    names = [os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/good \xff.png", b"/bad \xff.png")]
    shutil.copyfile(pictures / "0.png", names[0])
    Path(names[1]).write_bytes(b"")
    report = explain(names, tiny_bundle, tmp_path / "out", threads=1)
    assert report.document["pictures"][0]["image"].endswith("good \\xff.png")
    assert report.document["broken"][0]["image"].endswith("bad \\xff.png")
    assert "bad \\xff.png: the file is empty" in report.document["broken"][0]["error"]


def test_what_it_refuses(tiny_bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(pictures / "0.png")

    def told(bundle: Path, *more: str) -> str:
        assert main(words(bundle, tmp_path / "out", picture, *more)) != 0
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "does not take --prompt: its bridge reads the picture only" in told(tiny_bundle, "--prompt", "a dog")
    assert "does not take --queries" in told(tiny_bundle, "--queries", "2")
    manifest = Bundle.open(tiny_bundle).manifest
    copy = tmp_path / "copy"
    for changed, text in (
        (replace(manifest, precision="bf16"), "is in bf16"),
        (replace(manifest, merging=MergingRecord(2, 17, 17)), "merges patches in its vision encoder"),
        (replace(manifest, engines_of="0" * 64), "explain needs graphs, but"),
    ):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tiny_bundle, copy, ignore=shutil.ignore_patterns(MANIFEST))
        changed.write(copy)
        assert text in told(copy)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("clip", "it compares the class token with the text"),
        pytest.param("llava", "its bridge makes one visual token from each patch", marks=pytest.mark.slow),
        pytest.param("blip", "its language model attends to all patches", marks=pytest.mark.slow),
    ],
)
def test_a_bundle_without_queries(
    kind: str, text: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "checkpoint"
    if kind == "clip":
        drawing_blip.save_clip(source, 0, eos=drawing_blip.SEP)
    elif kind == "llava":
        drawing_llama.draw_llava(source, 0)
    else:
        drawing_blip.save_blip(source, "caption", 0)
    bundle = export_checkpoint(source, tmp_path / "bundle", verify="sample").bundle
    capsys.readouterr()
    assert main(words(bundle, tmp_path / "out", str(pictures))) == 1
    told = capsys.readouterr().err
    assert "has no queries that attend to patches" in told
    assert text in told
    assert "explain a bundle with a Q-Former" in told
