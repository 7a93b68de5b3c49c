"""``calibrate --search`` on a tiny bundle: the front, resuming, limits, and the published bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the parent is exported with torch")
pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

from blip2edge.bundle.bundle import Bundle
from blip2edge.calibration.confidence.references import References
from blip2edge.calibration.formats import GraphFormat, NumberFormat
from blip2edge.calibration.pictures import CalibrationPicture
from blip2edge.calibration.pipeline import calibrate
from blip2edge.calibration.search import measure, pipeline
from blip2edge.calibration.search.choices import PartGraphs, presets
from blip2edge.calibration.search.drop_limit import DropLimit
from blip2edge.calibration.search.front import FoundPoints, PointLimits
from blip2edge.calibration.search.journal import SearchJournal, unfinished_search
from blip2edge.calibration.search.pipeline import search
from blip2edge.calibration.search.points import SearchOptions
from blip2edge.calibration.search.predicted import BoardTimer
from blip2edge.calibration.search.variants import Variants, put_files
from blip2edge.cli import main
from blip2edge.errors import BundleError, OutputError
from blip2edge.runtime.bench.devices import find_device
from blip2edge.runtime.bench.plan import PlanOptions, stage_ms
from blip2edge.shapes.sources import bundle_shape
from tests.drawing import draw_pictures

FORMATS = ("w8a8", "int8")


def by_size(bundle: Path, *_: Any) -> dict[str, float]:
    """Milliseconds by the bytes of the graphs, in the place of measured ones."""
    sizes = {path.stem.partition(".")[0]: path.stat().st_size / 1e5 for path in bundle.glob("*.data")}
    language = sizes["decoder"]
    return {
        "preprocess": 1.0,
        "vision": sizes["vision_encoder"],
        "bridge": sizes["bridge"],
        "prefill": language,
        "decode": 9 * language,
    }


@pytest.fixture(scope="module", autouse=True)
def _times() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measured_ms", by_size)
        patch.setattr(measure, "ROUNDS", 1)
        patch.setattr(measure, "_product_seconds", lambda size: [2.0, 1.0 if size[1] > 32 else 3.0])
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for at, picture in enumerate(draw_pictures(3)):
        picture.save(folder / f"{at}.png")
    return folder


def run(bundle: Path, out: Path, images: Path, limits: PointLimits | None = None, **options: Any) -> FoundPoints:
    wanted = SearchOptions(limits or PointLimits(), formats=FORMATS, measured=4, scored=3)
    return search(bundle, out, images=images, options=wanted, threads=1, **options)[1]


@pytest.fixture(scope="module")
def state(tiny_bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a search that found no point within its limits."""
    out = tmp_path_factory.mktemp("state") / "out"
    with pytest.raises(BundleError, match=r"is within max_mb 0.001; the nearest is drop .* MB \(--weights int"):
        run(tiny_bundle, out, images, PointLimits(mb=0.001))
    assert [path.name for path in out.parent.iterdir()] == ["out.run"]  # nothing is published
    return out.parent / "out.run"


def resumed(state: Path, folder: Path) -> Path:
    """The name of an output whose search has this state."""
    shutil.copytree(state, folder / "out.run")
    return folder / "out"


@pytest.fixture(scope="module")
def found(
    tiny_bundle: Path, images: Path, state: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FoundPoints]:
    out = resumed(state, tmp_path_factory.mktemp("searched"))
    return out, run(tiny_bundle, out, images)


def test_progress_stays_within_its_total(tiny_bundle: Path, images: Path, state: Path, tmp_path: Path) -> None:
    """The plain flags are measured in addition to ``measured`` combinations, so the total counts both."""
    seen: list[tuple[str, int, int]] = []
    run(tiny_bundle, resumed(state, tmp_path), images, progress=lambda *report: seen.append(report))
    assert all(0 <= done <= total for _, done, total in seen)
    combinations = [report[1:] for report in seen if report[0] == "captions of combinations"]
    assert len(combinations) > 4
    assert combinations == [(at, combinations[0][1]) for at in range(combinations[0][1] + 1)]


def test_the_plain_flags_are_measured_with_the_other_points(found: tuple[Path, FoundPoints]) -> None:
    presets = [point for point in found[1].points if point.preset]
    assert {point.preset for point in presets} == {
        "--weights int8 (the default)", "--weights none", "the original bundle",
    }  # fmt: skip
    assert all(point.drop is not None for point in presets)
    assert len(found[1].front) >= 3
    measured = [point for point in found[1].points if point.drop is not None]
    assert {point.flags for point in found[1].front} == {
        point.flags
        for point in measured
        if not any(other.ms < point.ms and other.bytes < point.bytes and other.loss <= point.loss for other in measured)
    }


def test_time_and_bytes_add_up(found: tuple[Path, FoundPoints]) -> None:
    by_flags = {point.flags: point for point in found[1].points}
    parent, plain = (
        by_flags["--weights none --format vision_encoder=float --format bridge=float"],
        by_flags["--weights int8"],
    )
    one = by_flags["--weights int8 --format bridge=float"]
    other = by_flags["--weights none --format vision_encoder=float"]
    assert one.ms + other.ms == pytest.approx(parent.ms + plain.ms)
    assert one.bytes + other.bytes == parent.bytes + plain.bytes
    assert parent.nats == 0.0 < plain.nats


def test_the_published_bundle_is_that_of_its_plain_flags(
    found: tuple[Path, FoundPoints], tiny_bundle: Path, images: Path, tmp_path: Path
) -> None:
    out, points_ = found
    Bundle.open(out).verify()
    calibrate(tiny_bundle, tmp_path / "plain", images=images, formats=points_.rules, threads=1)
    manifests = [Bundle.open(bundle).manifest.to_json() for bundle in (out, tmp_path / "plain")]
    for manifest in manifests:
        for report in ("report.json", "report.html"):
            del manifest["files"][report]
    assert manifests[0] == manifests[1]
    assert not list(out.parent.glob(".*")) + list(out.parent.glob("*.run"))


def test_the_report_shows_the_points(found: tuple[Path, FoundPoints]) -> None:
    out, points_ = found
    document = json.loads((out / "report.json").read_text(encoding="utf-8"))["search"]
    assert document["chosen"] == points_.chosen.point.flags
    assert document["front"] == [point.flags for point in points_.front]
    assert (document["time"], document["loss"], document["pictures"]) == ("measured", "captions", 3)
    page = (out / "report.html").read_text(encoding="utf-8")
    measured = sum(point.drop is not None for point in points_.points)
    assert page.count("<circle") == 2 * measured
    assert f"{measured} measured and {len(points_.points) - measured} predicted points" in page


class Killed(BaseException):
    """In the place of a kill."""


def test_a_killed_search_goes_on_and_repeats_nothing(
    found: tuple[Path, FoundPoints], tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    kills = [3, 5, 8, 9]
    publish_value, publish_folder = SearchJournal._write, SearchJournal.folder

    def write(self: SearchJournal, name: str, value: Any) -> None:
        if name not in ("plan.json", "spent.json"):
            if kills and sum(one.endswith(".json") for one in done) == kills[0]:
                kills.pop(0)
                raise Killed
            done.append(name)
        publish_value(self, name, value)

    def folder(self: SearchJournal, name: str, fill: Any) -> Path:
        def counted(place: Path) -> None:
            fill(place)
            done.append(name)

        return publish_folder(self, name, counted)

    monkeypatch.setattr(SearchJournal, "_write", write)
    monkeypatch.setattr(SearchJournal, "folder", folder)
    result = None
    while result is None:
        try:
            result = run(tiny_bundle, tmp_path / "out", images)
        except Killed:
            continue
    assert not kills
    assert len(done) == len(set(done))
    assert result.points == found[1].points
    assert result.chosen == found[1].chosen


def test_a_search_that_was_killed_after_publishing(
    found: tuple[Path, FoundPoints], state: Path, tiny_bundle: Path, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The next run finds the bundle, and removes the state."""
    out = resumed(state, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SearchJournal, "clear", _raise_if_there)
        with pytest.raises(Killed):
            run(tiny_bundle, out, images)
    assert (out / "bundle.json").is_file()
    before = (out / "bundle.json").stat().st_ino
    with monkeypatch.context() as patch:  # with other references, it is published again
        patch.setattr(pipeline, "calibrate", _killed)
        with pytest.raises(Killed):
            run(tiny_bundle, out, images, references=References([], "another"), force=True)
    (out.parent / "out.run" / "published.json").write_text(json.dumps({"value": {"references": "", "before": ""}}))
    assert run(tiny_bundle, out, images).points == found[1].points
    assert (out / "bundle.json").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _killed(*_: Any, **__: Any) -> None:
    raise Killed


def test_force_replaces_a_bundle_of_the_same_graphs(
    found: tuple[Path, FoundPoints], state: Path, tiny_bundle: Path, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Only a marker in the state shows that a killed run has published; the same graphs alone do not."""
    out = resumed(state, tmp_path)
    shutil.copytree(found[0], out)
    monkeypatch.setattr(pipeline, "calibrate", _killed)
    for _ in range(2):  # the second time, the state has a marker, but the output is still the old one
        with pytest.raises(Killed):
            run(tiny_bundle, out, images, force=True)
    assert (out.parent / "out.run" / "published.json").is_file()


def test_the_plan_has_all_that_losses_depend_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red square")
    pictures = [CalibrationPicture(tmp_path / "a.png")]

    def plan(limit: DropLimit, threads: int | None = 1) -> dict[str, Any]:
        return pipeline._measure_plan(pictures, limit, threads)

    counted, scored = DropLimit(0.0), pipeline._caption_loss(pictures, lambda texts, references: 1.0)
    plans = [plan(counted), plan(counted, 2), plan(scored)]
    (tmp_path / "a.txt").write_text("a blue circle")
    plans.append(plan(scored))
    assert len({json.dumps(one) for one in plans}) == 4
    assert plan(counted) == plans[0]
    (tmp_path / "a.txt").unlink()
    assert pipeline._caption_loss(pictures, lambda texts, references: 1.0).measure == "captions"


def test_too_little_memory_ends_a_search_before_it_begins(
    tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, anyway: bool, **__: Any) -> None:
        raise BundleError(f"too little memory, anyway {anyway}", "")

    monkeypatch.setattr("blip2edge.calibration.pipeline.check_memory", refuse)
    with pytest.raises(BundleError, match="too little memory, anyway True"):
        run(tiny_bundle, tmp_path / "out", images, anyway=True)
    assert not list(tmp_path.iterdir())


def test_copies_are_made_only_for_what_is_measured_with_them(
    state: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[Path] = []
    monkeypatch.setattr(Variants, "_add_copies", lambda self, folder, *_: added.append(folder))
    journal = SearchJournal(resumed(state, tmp_path).with_suffix(".run"), tmp_path / "fresh")
    names = list(Bundle.open(tiny_bundle).manifest.graphs)
    parts = PartGraphs.of(names, names)
    choices = presets(parts.graphs)["the original bundle"]
    context: Any = None
    for copies, wanted in ((False, True), (True, False)):  # a board's time is predicted; the next token needs none
        Variants(context, journal, parts, lambda bundle, graphs: None, copies).bundle(choices, copies=wanted)
    assert not added
    Variants(context, journal, parts, lambda bundle, graphs: None).bundle(choices)
    assert len(added) == 1


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    for name, text in (("source", "new"), ("journal", "old"), ("target", "")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "a.data").write_text(text)
    put_files(tmp_path / "journal", tmp_path / "target", link=True)
    with pytest.raises(FileExistsError):
        put_files(tmp_path / "source", tmp_path / "target", link=True)
    assert (tmp_path / "journal" / "a.data").read_text() == "old"


def _raise_if_there(journal: SearchJournal) -> None:
    if (journal.path / "captions.json").exists():
        raise Killed


def test_other_limits_only_choose_again(
    state: Path, tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: Any) -> None:
        raise AssertionError("a finished step is repeated")

    monkeypatch.setattr(measure, "_nats", again)
    monkeypatch.setattr(measure, "caption_pictures", again)
    monkeypatch.setattr("blip2edge.calibration.search.variants.in_format", again)
    chosen = run(tiny_bundle, resumed(state, tmp_path), images, PointLimits(drop=100)).chosen
    assert chosen.rule == "the fastest point within --max-drop 100"


def test_an_existing_output_is_refused_before_the_pictures_are_read(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bundle.json").write_text("{}")
    with pytest.raises(OutputError, match="out exists"):
        run(tiny_bundle, tmp_path / "out", tmp_path / "no pictures")


def test_the_state_of_another_search(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    state = tmp_path / "out.run"
    state.mkdir()
    (state / "plan.json").write_text(json.dumps({"made_by": "blip2edge calibrate --search", "method": "mse"}))
    with pytest.raises(
        OutputError, match=r"is of a search with another plan: .*method, no_optimize, images, .* differ;"
    ):
        run(tiny_bundle, tmp_path / "out", images)
    assert unfinished_search(tmp_path / "out") == state
    shutil.rmtree(state)
    state.mkdir()
    (state / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by calibrate"):
        run(tiny_bundle, tmp_path / "out", images, force=True)
    assert (state / "notes.txt").is_file()
    assert unfinished_search(tmp_path / "out") is None


def test_one_other_value_of_a_plan_is_named_by_its_flag(tmp_path: Path) -> None:
    journal = SearchJournal(tmp_path / "out.run", tmp_path / "fresh")
    journal.begin({"board": "orin-nano-8gb", "threads": 1}, force=False)
    with pytest.raises(OutputError) as refused:
        journal.begin({"board": None, "threads": 1}, force=False)
    assert "another plan: --device differs; " in refused.value.text(lambda name, on: f"--{name.replace('_', '-')}")


def test_a_plain_calibration_names_a_search_that_did_not_end(
    tiny_bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SearchJournal(tmp_path / "out.run", tmp_path / "fresh").begin({"method": "smooth"}, force=False)
    words = ["calibrate", str(tiny_bundle), "-o", str(tmp_path / "out"), "--images", str(images), "--count", "2"]
    assert main([*words, "--weights", "none", "--threads", "1", "--no-optimize"]) == 0
    assert f"{tmp_path / 'out.run'} is of a search that did not end: " in capsys.readouterr().err


def test_a_board_is_predicted(tiny_bundle: Path) -> None:
    """Fewer bytes take less time, as the roofline says for small graphs; a Jetson runs no INT8 blocks."""
    parent = Bundle.open(tiny_bundle)
    timer = BoardTimer(parent, find_device("orin-nano-8gb"), 10, 4)
    assert timer.refused == ["fp16", "int8"]
    graphs = ("vision_encoder", "bridge", "decoder")
    ms = {
        (part, kind): sum(timer.ms(part, GraphFormat(NumberFormat(kind)), dict.fromkeys(graphs, size)).values())
        for part in ("vision_encoder", "bridge", "language")
        for kind, size in (("float", 10**8), ("w8a8", 10**8 // 4))
    }
    assert all(ms[part, "w8a8"] < ms[part, "float"] for part, _ in ms)
    shape, floats = bundle_shape(parent.manifest, parent.path), GraphFormat(NumberFormat("float"))
    sizes = {part.name: int(part.bytes("fp32")) for part in shape.parts}
    planned = stage_ms(shape, "fp32", find_device("orin-nano-8gb"), PlanOptions(prompt_tokens=4, new_tokens=10))
    for part in ("vision_encoder", "bridge", "language"):
        for stage, found in timer.ms(part, floats, sizes).items():
            assert found == pytest.approx(planned[stage]), stage
    smaller = timer.ms("language", GraphFormat(NumberFormat("int4")), {"decoder": 10**7})
    assert set(smaller) == {"prefill", "decode"}
    assert sum(smaller.values()) < 0.2 * ms["language", "float"]


def test_flags_that_do_not_go_with_a_search(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["calibrate", str(tiny_bundle), "-o", "out", "--images", "x"]
    assert main([*words, "--search", "--weights", "int4"]) == 2
    assert "--search and --weights cannot be combined" in capsys.readouterr().err
    assert main([*words, "--max-ms", "3"]) == 2
    assert "--max-ms belongs to a search; give --search too" in capsys.readouterr().err
