"""The last lines of a command name the commands that usually follow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import Manifest
from blip2edge.bundle.schema import DECODER
from blip2edge.cli import main
from blip2edge.cli.next_steps import calibrate_command, try_command
from blip2edge.runtime.backends.engine_files import KIND


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "my bundle"))


def changed(manifest: Manifest, **prompt: Any) -> Manifest:
    assert manifest.prompt is not None
    return replace(manifest, prompt=replace(manifest.prompt, **prompt))


def test_command_fits_the_kind_of_the_model(tiny_bundle: Path) -> None:
    manifest, path = Bundle.open(tiny_bundle).manifest, Path("a b")
    assert try_command(path, manifest) == "blip2edge caption IMAGE -b 'a b'"
    assert try_command(path, manifest, "rtx") == "blip2edge caption IMAGE -b 'a b' --backend rtx"
    assert try_command(path, changed(manifest, required=True)) == "blip2edge ask IMAGE \"QUESTION\" -b 'a b'"
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != DECODER}
    assert try_command(path, replace(manifest, graphs=graphs)) == "blip2edge match IMAGE --text \"TEXT\" -b 'a b'"
    bf16 = replace(manifest, precision="bf16")
    assert try_command(path, bf16).endswith(" --backend openvino")
    assert try_command(path, replace(bf16, engines_of="x")) == "blip2edge caption IMAGE -b 'a b'"


def test_calibrate_command(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    expected = "blip2edge calibrate a/b -o a/b-int8 --images DIR"
    assert calibrate_command(Path("a/b"), manifest) == expected
    for other in ({"precision": "bf16"}, {"engines_of": "x"}, {"calibration": {"method": "smooth"}}):
        assert calibrate_command(Path("a/b"), replace(manifest, **other)) is None
    monkeypatch.chdir(tmp_path)
    assert calibrate_command(Path(), manifest) == f"blip2edge calibrate . -o {tmp_path}-int8 --images DIR"
    parent = tmp_path.parent
    assert calibrate_command(Path(".."), manifest) == f"blip2edge calibrate .. -o {parent}-int8 --images DIR"


def last_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("next: ")]
    assert lines[-len(found) :] == found
    return found


def test_inspect_optimize_and_bench(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    assert last_lines(capsys) == [f"next: blip2edge caption IMAGE -b '{bundle}'"]
    assert main(["optimize", str(bundle)]) == 0
    assert last_lines(capsys) == [f"next: blip2edge bench '{bundle}'"]
    bench = ["bench", str(bundle), "--runs", "1", "--warmup", "0", "--tokens", "2", "--batch-sizes", "1"]
    assert main(bench) == 0
    assert last_lines(capsys) == [f"next: blip2edge calibrate '{bundle}' -o '{bundle}-int8' --images DIR"]
    assert main([*bench, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["backend"] == report["roofline"]["backend"] == "cpu"
    memory = report["memory"]
    assert memory["peak"] >= memory["resident"] > 0
    assert memory["peak"] >= memory["captioning"] > 0
    assert memory["peak"] >= memory["loading"] > 0


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    assert last_lines(capsys) == ["next: blip2edge demo"]
    monkeypatch.setattr("blip2edge.cli.demo.missing", lambda names: list(names)[:1])
    assert main(["doctor"]) == 0
    assert last_lines(capsys) == ["next: blip2edge caption IMAGE -b BUNDLE"]


@pytest.mark.parametrize(
    "words",
    [
        ["calibrate", "BUNDLE", "-o", "int8", "--images", "examples/pictures"],
        ["optimize", "BUNDLE"],
        ["build", "BUNDLE", "--target", "rtx", "--sm", "86"],
    ],
    ids=lambda words: words[0],
)
def test_bundle_of_engines_only_is_refused_by_what_needs_graphs(
    bundle: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Bundle.open(bundle)
    graphs = {file for graph in opened.manifest.graphs.values() for file in graph.files}
    kept = {name: record for name, record in opened.manifest.files.items() if name not in graphs}
    for name in graphs:
        (bundle / name).unlink()
    replace(opened.manifest, files=kept, engines_of=opened.sha256).write(bundle)
    assert main([str(bundle) if word == "BUNDLE" else word for word in words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1  # before any work was done
    assert f"needs graphs, but {bundle} contains engines only; use the bundle that the engines were built from" in error


def test_inspect_counts_engines(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.fake_engines import plug_in, write_engines

    plug_in(monkeypatch)
    assert main(["inspect", str(bundle)]) == 0
    assert "engines for" not in capsys.readouterr().out
    write_engines(bundle, bundle / KIND)
    assert main(["inspect", str(bundle)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("engines for"))
    names = [*Bundle.open(bundle).manifest.graphs, "step"]
    assert f": {len(names)} engines ({', '.join(names)}), " in line
    assert "not used" not in line
    (bundle / KIND / "x" / "engine.json").write_text('{"schema_version": 0}')
    assert main(["inspect", str(bundle)]) == 0
    assert "x: not used: " in capsys.readouterr().out
