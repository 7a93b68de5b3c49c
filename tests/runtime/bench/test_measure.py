"""bench: statistics from known times, and a whole run on a tiny bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.bundle.schema import DraftName
from blip2edge.cli import main
from blip2edge.errors import BackendError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.bench import measure as bench_module
from blip2edge.runtime.bench import roofline
from blip2edge.runtime.bench.measure import Bench, BenchOptions, BenchReport, bench
from blip2edge.runtime.bench.meters import CpuClock, EnergyMeter
from blip2edge.runtime.bench.report import bench_page, facts, markdown
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.decoding.speculative import SpeculationCost
from blip2edge.shapes.cost import Roofline, StageCost
from tests.drafted import add_draft
from tests.drawing import save
from tests.runtime.bench.blocked import without

MACHINE = Roofline(1e9, 2e9, 4e9)
WALL = {"preprocess": 1.0, "vision": 8.0, "bridge": 2.0, "prefill": 4.0, "decode": 30.0}
RUNS = (1.0, 3.0, 2.0, 10.0, 1.5)  # how often a stage took so long in each of five captions
COSTS = {"vision": StageCost(8e6, 0.0, 1e6), "decode": StageCost(2e6, 0.0, 9e6)}


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


class Joules(EnergyMeter):
    """Three joules a caption."""

    def __init__(self) -> None:
        self.source, self.reason, self.joules = "a fake", "", None

    def __enter__(self) -> Joules:  # noqa: PYI034 - typing.Self is of Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.joules = 3.0 * len(RUNS)


@pytest.fixture
def report(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> BenchReport:
    """Captions that take RUNS times WALL, and half of that in CPU time; several pictures at once twice as long."""
    scales: Iterator[float] = iter((99.0, *RUNS))

    def caption(_: Bench, tokens: int, pictures: int = 1, prompt: str | None = None) -> CpuClock:
        scale = next(scales, 1.0) * (2.0 if pictures > 1 else 1.0)
        clock = CpuClock()
        clock.ms = {stage: scale * ms for stage, ms in WALL.items()}
        clock.cpu_ms = {stage: scale * ms / 2 for stage, ms in WALL.items()}
        return clock

    monkeypatch.setattr(Bench, "caption", caption)
    monkeypatch.setattr(roofline, "measure", lambda backend: MACHINE)
    monkeypatch.setattr(bench_module, "EnergyMeter", Joules)
    options = BenchOptions(runs=len(RUNS), warmup=1, tokens=7, batches=(1, 4), prompts=(0, 2), lengths=(1, 4))
    return bench(captioner, options, start_s=1.25, cost_of=lambda prompt, tokens: COSTS)


def test_percentiles_of_each_stage(report: BenchReport) -> None:
    for stage, ms in {**WALL, "total": sum(WALL.values())}.items():
        for part in (50, 90, 99):
            assert report.stages[stage].ms[f"p{part}"] == pytest.approx(np.percentile(RUNS, part) * ms)
        assert report.stages[stage].cpu_ms == pytest.approx(2.0 * ms / 2)  # the middle one of RUNS
        assert report.stages[stage].least_cpu_ms == pytest.approx(1.0 * ms / 2)
    assert report.tokens_per_s == pytest.approx(6 / (2.0 * WALL["decode"] / 1e3))


def test_shares_of_the_roofline(report: BenchReport) -> None:
    """8e6 operations at 2e9 a second are 4 ms, as many as vision took; 9e6 bytes at 1e9 are 9 ms of 15."""
    assert report.stages["vision"].share == pytest.approx(1.0)
    assert report.stages["vision"].bound == "products"
    assert report.stages["decode"].share == pytest.approx(9 / 15)
    assert report.stages["decode"].bound == "bytes"
    assert report.stages["bridge"].share is None


def test_growth_energy_and_memory(report: BenchReport, captioner: Captioner) -> None:
    cpu = sum(WALL.values()) / 2 / 1e3
    batch = {row["batch"]: row for row in report.sweeps["batch"]}
    assert batch[1.0]["pictures_per_cpu_s"] == pytest.approx(1 / cpu)
    assert batch[4.0]["pictures_per_cpu_s"] == pytest.approx(4 / (2 * cpu))
    assert batch[4.0]["pictures_per_s"] == pytest.approx(4 / (4 * cpu))
    assert report.sweeps["caption"] == [{"tokens": 4.0, "decode_cpu_ms_per_token": WALL["decode"] / 2 / 3}]
    slots = [row["slots"] for row in report.sweeps["prompt"]]
    assert slots[1] == slots[0] + 2
    assert report.energy == {"source": "a fake", "joules_per_caption": 3.0}
    weights = sum(path.stat().st_size for path in captioner.bundle.path.glob("*.onnx.data"))
    assert report.memory["graphs"] == weights > 0
    assert report.draft is None


def test_the_table_and_the_page_say_what_was_measured(report: BenchReport) -> None:
    lines = markdown(report).splitlines()
    p90 = np.percentile(RUNS, 90) * WALL["vision"]
    p99 = np.percentile(RUNS, 99) * WALL["vision"]
    assert f"| vision | 16.0 | {p90:.1f} | {p99:.1f} | 8.0 | 100% (products) |" in lines
    assert "| bridge | 4.0 |" in "\n".join(lines)
    told = facts(report)
    assert "100.0 tokens/s while decoding, 7 tokens per caption" in told
    assert any("loaded in 1.25 s" in fact for fact in told)
    assert "3.00 J per caption (a fake)" in told
    assert not any("tokens per pass" in fact for fact in told)
    written = bench_page(report)
    for fact in told:
        assert escape(fact) in written
    bars = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)" height="14.0"', written)]
    assert len(bars) == 2 * len(WALL)
    longest = max(bars)
    assert bars[2] == pytest.approx(longest * WALL["vision"] / WALL["decode"], abs=0.1)
    assert bars[3] == pytest.approx(bars[2] / 2, abs=0.1)  # CPU time beside wall time
    assert written.count("<polyline") == 3


def test_a_whole_run_as_json(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = tmp_path / "page.html"
    flags = ["--runs", "2", "--warmup", "0", "--tokens", "3", "--batch-sizes", "1", "--threads", "1"]
    assert main(["bench", str(tiny_bundle), *flags, "--json", "--html", str(html)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["draft"] is None
    assert values["stages"]["total"]["ms"]["p50"] > values["stages"]["vision"]["ms"]["p50"] > 0
    assert 0 < values["stages"]["vision"]["share"] < 5
    assert values["options"]["runs"] == 2
    assert "<svg" in html.read_text()


def test_tokens_a_pass_with_a_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpeculationCost, "pays", True)
    save(tmp_path / "checkpoint", seed=5, vision_layers=1)
    add_draft(tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    flags = ["--runs", "2", "--warmup", "0", "--tokens", "12", "--batch-sizes", "1", "--threads", "1"]
    draft: DraftName
    for draft, kind in (("auto", "itg"), ("lookup", "lookup"), ("none", None)):
        assert main(["bench", str(bundle), *flags, "--draft", draft, "--json"]) == 0
        found: Any = json.loads(capsys.readouterr().out)["draft"]
        assert (None if found is None else found["kind"]) == kind
        if found is not None:
            captioner = Captioner.load(bundle, threads=1, draft=draft)
            alone = captioner.caption(Bench(captioner).picture, max_new_tokens=12, min_new_tokens=12)
            assert found["tokens_per_pass"] == alone.tokens_per_pass
    assert main(["bench", str(bundle), *flags, "--draft", "lookup"]) == 0
    assert re.search(r"- \d\.\d\d tokens per pass \(draft model: lookup\)", capsys.readouterr().out)


def test_more_tokens_than_the_context_holds(
    captioner: Captioner, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = Bench(captioner).room()
    flags = ["--runs", "1", "--warmup", "0", "--batch-sizes", "1", "--threads", "1", "--json", "--tokens"]
    assert main(["bench", str(tiny_bundle), *flags, str(most + 1)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"expected --tokens to be at most {most}, the room that the prompt leaves" in output.err
    alone = captioner.caption(Bench(captioner).picture, max_new_tokens=most + 9, min_new_tokens=most + 9)
    assert len(alone.tokens) == most


def test_what_the_sweeps_leave_out_is_said(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", lambda backend: MACHINE)
    monkeypatch.setattr(type(captioner.generator.language.decoder), "max_rows", 2)
    most, calls = Bench(captioner).room(), []
    options = BenchOptions(1, 0, 2, batches=(1, 3), prompts=(0, 10_000), lengths=(2, most, most + 1))
    report = bench(captioner, options, start_s=1.0, progress=lambda *state: calls.append(state))
    assert [row["batch"] for row in report.sweeps["batch"]] == [1]
    assert [row["tokens"] for row in report.sweeps["caption"]] == [2, most]
    assert len(report.sweeps["prompt"]) == 1
    left = {f"captions of {most + 1} tokens", "batches of 3 pictures", "prompts of 10000 words"}
    assert left < report.left_out.keys()
    last = {stage: (done, total) for stage, done, total in calls}
    assert last == {"captions": (1, 1), "roofline": (1, 1), "sweeps": (3, 3)}


@pytest.mark.parametrize("name", ["runs", "tokens"])
def test_limits(name: str) -> None:
    changed: dict[str, Any] = {name: 0}
    with pytest.raises(UsageError, match=f"{name} must be at least 1"):
        BenchOptions(**changed)


def test_openvino_is_measured_without_onnxruntime(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'blip2edge[openvino]'")
    options = ("--runs", "1", "--warmup", "0", "--tokens", "2", "--batch-sizes", "1", "--threads", "1")
    done = without(("onnxruntime",), "bench", str(tiny_bundle), "--backend", "openvino", "--json", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["roofline"]["gigaops_int8"] > 0
    assert report["stages"]["vision"]["share"] > 0
    assert "roofline" not in report["left_out"]


def test_without_a_backend_for_the_cpu_there_is_no_roofline(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines run without one: the report says so, and is written all the same."""
    asked: list[str] = []

    def missing(backend: str) -> Roofline:
        asked.append(backend)
        raise BackendError(f"{backend} is not installed")

    monkeypatch.setattr(roofline, "measure", missing)
    options = BenchOptions(runs=1, warmup=0, tokens=2, batches=(1,), prompts=(0,), lengths=(2,))
    report = bench(captioner, options, start_s=1.0, cost_of=lambda prompt, tokens: COSTS)
    assert asked == ["cpu", "openvino"]
    assert report.to_json()["roofline"] == {}
    assert {stage.share for stage in report.stages.values()} == {None}
    assert "neither is installed" in report.left_out["roofline"]
    assert "not measured: roofline" in markdown(report)
    assert "<svg" in bench_page(report)
