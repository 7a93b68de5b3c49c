"""The tables that commands print at their end, and the files that they write on request."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import MergingRecord
from blip2edge.bundle.outputs.files import write_output
from blip2edge.bundle.schema import DECODER
from blip2edge.cli import demo, main
from blip2edge.cli.export import merging_line
from blip2edge.cli.table import difference, size, table
from blip2edge.errors import OutputError
from blip2edge.runtime.backends.probe import Check
from blip2edge.runtime.bench import doctor
from blip2edge.training.config import TrainingConfig
from tests.test_cli import one_error_line


def test_export_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[dict[str, Any]] = []

    def export_checkpoint(checkpoint: str, output: Path, **options: Any) -> SimpleNamespace:
        calls.append({"checkpoint": checkpoint, "output": output, **options})
        options["progress"]("decoder", 1, 1)
        graph = SimpleNamespace(
            name="decoder",
            bytes=1_500_000,
            seconds=1.25,
            max_difference=1.5e-5,
            relative=2e-6,
            tolerance=1e-4,
        )
        return SimpleNamespace(
            bundle=output,
            graphs=[graph],
            verify="full",
            seconds=2.0,
            peak_memory_bytes=400_000_000,
            merging=None,
            warnings=["config.json: not used: colour"],
        )

    module = ModuleType("blip2edge.export.pipeline")
    vars(module)["export_checkpoint"] = export_checkpoint
    monkeypatch.setitem(sys.modules, "blip2edge.export.pipeline", module)
    monkeypatch.setattr("blip2edge.model.checkpoint.stored.files.find_checkpoint", Path)  # it is not on the hub
    manifest = SimpleNamespace(graphs={DECODER: None}, prompt=None, precision="fp16", engines_of="", calibration={})
    monkeypatch.setattr(Bundle, "open", lambda path: SimpleNamespace(path=path, manifest=manifest))
    assert (
        main(
            [
                *("export", "some/name", "-o", "out", "--precision", "fp16", "--verify", "sample"),
                *("--force", "--no-optimize", "--merge-tokens", "4"),
            ]
        )
        == 0
    )
    output = capsys.readouterr()
    assert output.out.splitlines()[2].split() == [
        "decoder",
        "1.5",
        "MB",
        "1.2",
        "1.5e-05",
        "2.0e-06",
        "1.0e-04",
    ]
    assert output.out.splitlines()[-3:] == [
        "out: verified (full) against torch, 2.0 s, peak memory 400.0 MB",
        "next: blip2edge caption IMAGE -b out",
        "next: blip2edge calibrate out -o out-int8 --images DIR",
    ]
    assert output.err.startswith("decoder: 1/1")
    assert output.err.endswith("warning: config.json: not used: colour\n")
    assert {**calls[0], "progress": None, "notify": None} == {
        "checkpoint": "some/name",
        "output": Path("out"),
        "precision": "fp16",
        "verify": "sample",
        "force": True,
        "base": None,
        "merge_tokens": 4,
        "anyway": False,
        "notify": None,
        "progress": None,
    }


def test_merged_patches_are_told_with_what_they_change() -> None:
    counts = "merged patches: 4 a layer, 65 embeddings become 53; "
    seen = MergingRecord(4, 53, 65, "visual_tokens", 0.98765, 0.9, 8)
    told = "visual_tokens without merging: cosine 0.9877 (lowest 0.9000) on 8 drawn pictures"
    assert merging_line(seen) == counts + told
    assert merging_line(MergingRecord(4, 53, 65)).startswith(counts + "not compared")


@pytest.mark.parametrize(
    ("flags", "step", "expected"),
    [
        ([], 40, "the snapshot of stage2 step 40 is in out.run; resume with: blip2edge train stage2 -c r.toml -o out"),
        (["--force"], 40, "resume with: blip2edge train stage2 -c r.toml -o out --force --resume"),
        ([], None, "no snapshot was written yet, so the same command starts from the beginning"),
        (["2", "2"], 40, "resume with: torchrun --nproc-per-node 2 -m blip2edge train stage2 -c r.toml -o out"),
        (["8", "4"], 40, "resume with: the same launcher and blip2edge train stage2 -c r.toml -o out"),
    ],
)
def test_interrupted_train_says_how_to_go_on(
    flags: list[str],
    step: int | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(stage: str, config: Path, out: Path, **options: Any) -> None:
        options["log"]("stage2: step 20/300 loss 1.2500 rate 8.0e-04")
        raise KeyboardInterrupt

    module = ModuleType("blip2edge.training.run")
    snapshots = SimpleNamespace(position=step and f"stage2 step {step}", directory=Path("out.run"))
    vars(module).update(train=train, snapshots_of=lambda out: snapshots)
    monkeypatch.setitem(sys.modules, "blip2edge.training.run", module)
    monkeypatch.setattr("blip2edge.training.config.load_config", lambda path: TrainingConfig())  # no such file
    if flags and flags[0].isdigit():  # processes in all, and on this machine
        monkeypatch.setenv("WORLD_SIZE", flags[0])
        monkeypatch.setenv("LOCAL_WORLD_SIZE", flags[1])
        flags = []
    assert main(["train", "stage2", "-c", "r.toml", "-o", "out", *flags]) == 130
    loss, hint, end = capsys.readouterr().err.splitlines()
    assert loss == "stage2: step 20/300 loss 1.2500 rate 8.0e-04"
    assert expected in hint
    assert end == "interrupted"


def test_train_tells_the_scores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[dict[str, Any]] = []

    def train(stage: str, config: Path, out: Path, **options: Any) -> dict[str, Any]:
        kept = {name: options[name] for name in ("force", "resume")}
        calls.append({"stage": stage, "config": config, "out": out, **kept})
        options["progress"]("vision", 3, 3)
        broken = {"samples": 4, "first": {"dog.jpg": "the picture is broken"}}
        phases = {"vision": {"steps": 3}, "stage1": {"steps": 5, "broken": broken}}
        scores = {"n": 10, "exact_match": 0.9}
        return {"parameters": 7, "seconds": 2.0, "phases": phases, "heldout": scores}

    module = ModuleType("blip2edge.training.run")
    vars(module)["train"] = train
    monkeypatch.setitem(sys.modules, "blip2edge.training.run", module)
    monkeypatch.setattr("blip2edge.training.config.load_config", lambda path: TrainingConfig())  # no such file
    assert main(["train", "stage1", "-c", "recipe.toml", "-o", "out", "--resume"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "out: 7 parameters, trained in 2.0 s",
        "stage1: skipped dog.jpg: the picture is broken (4 samples in all)",
        "10 held-out scenes: 90.00% exact captions",
        "next: blip2edge export out -o BUNDLE",
    ]
    assert output.err.startswith("vision: 3/3")
    assert calls == [
        {
            "stage": "stage1",
            "config": Path("recipe.toml"),
            "out": Path("out"),
            "force": False,
            "resume": True,
        }
    ]


def test_demo_refuses_a_directory_with_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    one_error_line(capsys.readouterr().err)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("works", "said"),
    [
        ((False, False), "NVIDIA driver: none; TensorRT: not installed"),
        ((True, False), "TensorRT: not installed"),
        ((True, True), "the demo runs on the CPU; make the engines with: blip2edge build BUNDLE"),
    ],
)
def test_demo_tells_why_no_engine_ran(works: tuple[bool, bool], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        Check("CPU", False, "of no matter"),
        Check("NVIDIA driver", works[0], "none"),
        Check("TensorRT", works[1], "not installed"),
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda: checks)
    assert demo._tensorrt() == said


def test_a_file_that_cannot_be_written_names_its_flag(tmp_path: Path) -> None:
    write_output(tmp_path / "page.html", "é", "html")
    assert (tmp_path / "page.html").read_bytes() == "é".encode()
    with pytest.raises(OutputError, match=r"could not be written \(.*\); give another html$"):
        write_output(tmp_path / "absent" / "page.html", "", "html")


def test_units_and_tables() -> None:
    assert [size(count) for count in (0, 999, 1500, 7_400_000_000)] == ["0 B", "999 B", "1.5 KB", "7.4 GB"]
    assert [difference(value) for value in (0.0, 1.234e-5)] == ["0", "1.2e-05"]
    assert table(["a", "n"], [["x", "1"], ["long", "23"]], right=(1,)).splitlines() == [
        "a      n",
        "----  --",
        "x      1",
        "long  23",
    ]
