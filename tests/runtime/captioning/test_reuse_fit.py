"""Thresholds fitted to a stated rate of missed changes: the bound, the fit, the steps of reuse, and the kept file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from blip2edge.cli.reuse_page import reuse_page
from blip2edge.errors import DataError, UsageError
from blip2edge.runtime.captioning.encoder import PreparedBatch
from blip2edge.runtime.captioning.reuse import fit as reuse_fit
from blip2edge.runtime.captioning.reuse.fit import (
    AUDIT_EVERY,
    AuditClock,
    AuditMonitor,
    FrameTimes,
    Recording,
    ReuseFit,
    Thresholds,
    fit_thresholds,
    frames_needed,
    upper_bound,
)
from blip2edge.runtime.captioning.reuse.frames import feature_distance, features_of
from blip2edge.runtime.captioning.reuse.ladder import ReuseLadder, ReusePlan, fit_document, read_fit
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.text.prompt import Prompt


@pytest.fixture(autouse=True)
def _few_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pairs of thresholds are tried, and a frame counts more, so that a fit is fast."""
    monkeypatch.setattr(reuse_fit, "LEAST_EFFECT", LEAST_EFFECT)
    monkeypatch.setattr(reuse_fit, "SKIP_STEPS", 3)
    monkeypatch.setattr(reuse_fit, "CAPTION_STEPS", 2)


LEAST_EFFECT = 8.0

KEY: dict[str, Any] = {"bundle": "a" * 64, "prompt": None, "options": {"num_beams": 1}, "miss_rate": 0.05}


class Shot(NamedTuple):
    """A frame of a film: its grey level, its feature, and the number of its caption."""

    level: float
    feature: float
    caption: int


class StubEncoder:
    """Gives a shot its level as pixels; its visual token is (feature, caption / 10^6)."""

    def __init__(self) -> None:
        self.images = SimpleNamespace(preprocessing=SimpleNamespace(spans=np.ones(3, np.float32)))
        self.vision_runs = 0

    def prepare(self, images: Sequence[Shot], texts: Sequence[Any], clock: Any, queries: Any) -> PreparedBatch:
        self.shot = images[0]
        pixels = np.full((1, 3, 4, 4), self.shot.level, np.float32)
        return PreparedBatch([Prompt(((1,),), 0, None)], [1], pixels, {})

    def run_vision(self, pixels: Any, clock: Any) -> dict[str, Any]:
        self.vision_runs += 1
        tokens = np.array([[[self.shot.feature, self.shot.caption * 1e-6]]], np.float32)
        return {"image_embeds": tokens}

    def run_bridge(self, outputs: dict[str, Any], instruction: Any, clock: Any) -> dict[str, Any]:
        clock.ms["vision"], clock.ms["decode"] = 3.0, 1.0
        return {**outputs, "visual_tokens": outputs["image_embeds"]}


class StubGenerator:
    """Reads the caption's number from the visual token."""

    def __init__(self) -> None:
        self.language = SimpleNamespace(context=lambda pictures: {})
        self.runs = 0

    def complete(self, batch: Any, options: Any, numbers: Any, clock: Any) -> list[Generated]:
        self.runs += 1
        number = round(float(batch.pictures["visual_tokens"][0, 0, 1]) * 1e6)
        return [Generated((number,), "eos", None)]

    def text(self, generated: Generated, options: Any) -> str:
        return str(generated.tokens[0])

    def result(self, image: Any, prompt: Any, tokens: int, generated: Generated, *_: Any) -> Any:
        return SimpleNamespace(text=str(generated.tokens[0]))


def ladder_of(plan: ReusePlan, options: GenerationOptions | None = None) -> Any:
    return ReuseLadder(StubEncoder(), StubGenerator(), options or GenerationOptions(), plan, KEY)  # type: ignore[arg-type]


def scenes(count: int, length: int = 8, seed: int = 0) -> list[Shot]:
    """Scenes of another level, feature and caption each; the frames of a scene differ by noise of 0.001."""
    rng = np.random.default_rng(seed)
    return [
        Shot(0.5 * (scene % 2) + float(rng.uniform(0, 0.001)), 1.0 + scene % 3, scene % 5)
        for scene in range(count)
        for _ in range(length)
    ]


def recorded(film: Sequence[Shot]) -> Recording:
    found = Recording()
    for shot in film:
        cells = np.full(48, shot.level, np.float32)
        features = features_of(np.array([[[shot.feature, shot.caption * 1e-6]]], np.float32))
        found.add(cells, features, str(shot.caption), FrameTimes(3.0, 1.0))
    return found


def below(missed: int, frames: int, rate: float) -> float:
    """Probability of at most so many misses."""
    return sum(math.comb(frames, k) * rate**k * (1 - rate) ** (frames - k) for k in range(missed + 1))


@pytest.mark.parametrize(("missed", "frames", "level"), [(0, 59, 0.05), (1, 20, 0.025), (7, 300, 1e-4), (19, 20, 0.05)])
def test_the_bound_is_that_of_clopper_and_pearson(missed: int, frames: int, level: float) -> None:
    assert below(missed, frames, upper_bound(missed, frames, level)) == pytest.approx(level, rel=1e-9)


def test_the_bound_of_parts_lies_between_those_of_whole_numbers() -> None:
    found = [upper_bound(missed, 100, 0.05) for missed in (1, 1.5, 2)]
    assert found == sorted(found)
    assert upper_bound(0, 0, 0.05) == upper_bound(3, 3, 0.05) == 1.0


def test_frames_needed_is_the_smallest_number() -> None:
    level = 0.05 / 2 / (4 * 3 * 2 - 1)
    needed = frames_needed(0.05)
    assert upper_bound(0, needed / LEAST_EFFECT, level) <= 0.05 < upper_bound(0, (needed - 1) / LEAST_EFFECT, level)


def test_thresholds_between_noise_and_changes_are_found() -> None:
    fit = fit_thresholds(recorded(scenes(250)), 0.05)
    assert fit.frames == 2000
    assert fit.changes == 249
    assert fit.chosen is not None
    assert 0 < fit.thresholds.skip <= 0.5
    assert fit.chosen.missed == 0
    assert fit.chosen.upper <= 0.05
    assert fit.chosen.skipped > 0.8
    assert fit.chosen.saved == pytest.approx(fit.chosen.skipped + fit.chosen.captions * 0.25)


def test_the_bound_of_every_point_by_hand() -> None:
    """Every tenth frame of a still film has another caption, and no threshold separates it."""
    film = [Shot(0.0, 1.0, 1 if at % 10 == 5 else 0) for at in range(500)]
    fit = fit_thresholds(recorded([*film, *scenes(5)]), 0.05)
    assert fit.chosen is None
    assert fit.thresholds == Thresholds()
    level = 0.05 / 2 / len(fit.curve)
    for point in fit.curve:
        effect = point.design_effect
        assert point.upper == pytest.approx(upper_bound(point.missed / effect, point.reused / effect, level))
        assert point.rate == (point.missed / point.reused if point.reused else 0.0)


def test_misses_that_come_together_count_as_few_frames() -> None:
    """Of 1000 frames 100 have another caption, spread evenly or all in one block: these have the larger bound."""

    def loosest(film: list[Shot]) -> Any:
        return max(fit_thresholds(recorded(film), 0.05).curve, key=lambda point: point.saved)

    still, other = Shot(0.0, 1.0, 0), Shot(0.0, 1.0, 1)
    spread = loosest([*[still] * 9, other] * 100)
    together = loosest([*[still] * 800, *[still, other] * 100])
    assert spread.reused == together.reused
    assert min(spread.missed, together.missed) > 50
    assert together.design_effect == together.missed
    assert spread.design_effect < together.design_effect
    assert together.upper > spread.upper


def test_frames_that_are_the_same_bit_by_bit_are_reused() -> None:
    film = [shot._replace(level=round(shot.level)) for shot in scenes(60)]
    curve = fit_thresholds(recorded(film), 0.05).curve
    assert any(point.skipped > 0.8 and not point.missed for point in curve)


def test_too_few_frames_are_not_enough() -> None:
    assert fit_thresholds(recorded(scenes(5)), 0.05).chosen is None


def test_where_nothing_is_missed_the_least_design_effect_counts() -> None:
    rng = np.random.default_rng(1)
    still = [Shot(float(rng.uniform(0, 0.001)), 1.0, 0) for _ in range(600)]
    fit = fit_thresholds(recorded(still), 0.05)
    assert {point.design_effect for point in fit.curve} == {LEAST_EFFECT}
    assert fit.chosen is None


def test_later_fits_need_more_evidence() -> None:
    film = recorded(scenes(40))
    first, third = (fit_thresholds(film, 0.05, attempt).curve[-1].upper for attempt in (1, 3))
    assert first < third


def test_the_ladder_does_what_the_replay_did() -> None:
    film = scenes(250)
    plan = ReusePlan(frames=len(film))
    ladder = ladder_of(plan)
    assert {ladder(shot)[1] for shot in film} == {"fit"}
    ladder._clock, ladder._last = AuditClock(), None
    steps = [ladder(shot)[1] for shot in film]
    chosen = ladder.fit.chosen
    assert steps.count("skip") == round(chosen.skipped * len(film))
    assert steps.count("caption") == round(chosen.captions * len(film))
    assert steps.count("audit") == ladder.audits.frames


def test_what_each_step_computes(tmp_path: Path) -> None:
    ladder = started(tmp_path, skip=0.1, caption=0.1)
    ran = []
    shots = [Shot(0.0, 1.0, 1), Shot(0.05, 1.0, 1), Shot(0.5, 1.05, 1), Shot(0.55, 9.0, 2), Shot(0.5, 2.0, 2)]
    for shot in shots:
        result, step = ladder(shot)
        ran.append((step, result.text, ladder._encoder.vision_runs, ladder._generator.runs))
    assert ran == [
        ("full", "1", 1, 1),
        ("skip", "1", 1, 1),
        ("caption", "1", 2, 1),
        ("skip", "1", 2, 1),  # near the third shot, whose features were near
        ("skip", "1", 2, 1),
    ]
    assert ladder(Shot(0.5, 2.0, 2), "another prompt")[1] == "features"
    assert (ladder._encoder.vision_runs, ladder._generator.runs) == (2, 2)
    assert ladder(Shot(0.9, 2.0, 2), "another prompt")[1] == "full"
    assert ladder(Shot(0.1, 2.0, 2), "a third prompt")[1] == "full"


def test_slow_changes_add_up_while_prompts_alternate(tmp_path: Path) -> None:
    """A frame whose features are reused was not encoded: the next one is compared with the last encoded picture."""
    ladder = started(tmp_path, skip=0.1, caption=0.0)
    steps = [ladder(Shot(0.04 * at, 1.0, at), "ab"[at % 2])[1] for at in range(7)]
    assert steps == ["full", "features", "features", "full", "features", "features", "full"]


def test_reused_features_are_audited(tmp_path: Path) -> None:
    """The caption from old features is compared with the frame's own, of the same prompt."""
    ladder = started(tmp_path, skip=0.1, caption=0.0)
    steps = [ladder(Shot(0.0, 1.0, 1), "ab"[at % 2])[1] for at in range(2 * AUDIT_EVERY)]
    assert set(steps) == {"full", "features", "audit"}
    assert (ladder.audits.frames, ladder.audits.missed) == (steps.count("audit"), 0)
    while ladder.audits.missed == 0:
        steps.append(ladder(Shot(0.0, 1.0, 2), "ab"[len(steps) % 2])[1])
    assert steps[-1] == "audit"
    assert len(steps) <= 4 * AUDIT_EVERY


def started(
    tmp_path: Path, *, skip: float, caption: float, report: Callable[[str], None] = lambda sentence: None
) -> Any:
    """A ladder with a kept fit, whose first audits are far away."""
    document = kept()
    document["chosen"]["thresholds"] = {"skip": skip, "caption": caption}
    (tmp_path / "fit.json").write_text(json.dumps(document))
    ladder = ladder_of(ReusePlan(frames=2000, path=tmp_path / "fit.json", report=report))
    ladder._clock._at, ladder._clock._place = 1, 0
    return ladder


def kept() -> dict[str, Any]:
    """The document of a fit that chose thresholds."""
    document: dict[str, Any] = json.loads(json.dumps(fit_document(_fit(), KEY)))
    return document


_FITS: list[ReuseFit] = []


def _fit() -> ReuseFit:
    if not _FITS:
        _FITS.append(fit_thresholds(recorded(scenes(250)), 0.05))
    return _FITS[0]


def test_drift_is_caught_by_the_audits(tmp_path: Path) -> None:
    """The light is the same and the captions change in every frame: three audits see it, and a fit follows."""
    said: list[str] = []
    ladder = started(tmp_path, skip=0.1, caption=0.1, report=said.append)
    for _ in range(100):
        ladder(Shot(0.0, 1.0, 0))
    assert ladder.audits.missed == 0
    assert not ladder.is_fitting
    steps: list[str] = []
    while not ladder.is_fitting:
        steps.append(ladder(Shot(0.0, 1.0, len(steps) + 1))[1])
    assert len(steps) <= 5 * AUDIT_EVERY
    assert (ladder.audits.missed, len(said)) == (3, 1)
    assert "audited frames had another caption" in said[0]
    assert steps.count("audit") >= 3
    assert {ladder(shot)[1] for shot in scenes(250)} == {"fit"}
    assert "thresholds fitted on 2000 frames" in said[1]
    assert not ladder.is_fitting
    assert ladder.audits.missed == 0


def test_a_change_that_is_seen_is_no_miss(tmp_path: Path) -> None:
    ladder = started(tmp_path, skip=0.1, caption=0.1)
    given = [(ladder(shot)[0].text, str(shot.caption)) for shot in scenes(120, seed=3)]
    assert all(one == other for one, other in given)
    assert ladder.audits.missed == 0
    assert ladder.audits.frames > 10


def test_audits_report_their_bound() -> None:
    monitor = AuditMonitor(0.05)
    assert monitor.to_json() == {"frames": 0, "missed": 0, "rate": None, "upper": 1.0}
    for at in range(59):
        monitor.add(at == 7)
    assert monitor.to_json() == {
        "frames": 59,
        "missed": 1,
        "rate": 1 / 59,
        "upper": round(upper_bound(1, 59, 0.05), 4),
    }
    assert not monitor.is_raised


def test_one_frame_of_each_group_is_audited() -> None:
    clock = AuditClock(3)
    due = [clock.is_due() for _ in range(20 * AUDIT_EVERY)]
    assert [sum(due[at : at + AUDIT_EVERY]) for at in range(0, len(due), AUDIT_EVERY)] == [1] * 20


def test_without_a_fit_it_is_tried_again_with_more_frames() -> None:
    said: list[str] = []
    documents: list[dict[str, Any]] = []
    ladder = ladder_of(ReusePlan(frames=50, report=said.append, on_fit=documents.append))
    steps = {ladder(shot)[1] for shot in scenes(5, 20)}
    assert steps == {"fit"}
    assert [one["frames"] for one in documents] == [50, 100]
    assert all(one["chosen"] is None for one in documents)
    assert f"at least {frames_needed(0.05)} reused frames are needed" in said[0]
    ladder(Shot(0.0, 1.0, 0))
    ladder.finish()
    assert documents[-1]["frames"] == 101


def test_frames_of_another_shape_start_again() -> None:
    recording = recorded(scenes(2))
    recording.add(np.zeros(12, np.float32), np.zeros((1, 64), np.float32), "x", FrameTimes(1, 1))
    assert len(recording) == len(recording.cells) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bundle", "b" * 64, "another bundle"),
        ("prompt", "a photo of", "another prompt: expected .a photo of., got null"),
        ("options", {"num_beams": 2}, "another set of generation options"),
        ("miss_rate", 0.01, "another rate of missed changes: expected 0.01, got 0.05"),
    ],
)
def test_a_kept_fit_is_refused_for_another(name: str, value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(kept()))
    assert read_fit(path, KEY) == _fit()
    with pytest.raises(UsageError, match=message) as caught:
        read_fit(path, {**KEY, name: value})
    assert caught.value.field == "reuse_fit"


@pytest.mark.parametrize("change", [{"format": 2}, {"curve": None}, {"frames": -1}, {"times": {}}])
def test_a_damaged_kept_fit_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps({**kept(), **change}))
    with pytest.raises(DataError, match=f"a fit of reuse thresholds .{next(iter(change))}"):
        read_fit(path, KEY)


def test_no_kept_file_is_no_fit(tmp_path: Path) -> None:
    assert read_fit(tmp_path / "none.json", KEY) is None


def test_random_texts_are_refused() -> None:
    with pytest.raises(UsageError, match="sampling draws a new text each time"):
        ladder_of(ReusePlan(), GenerationOptions(temperature=1.0))
    assert ladder_of(ReusePlan(), GenerationOptions(temperature=1.0, seed=3)).is_fitting


@pytest.mark.parametrize("plan", [{"rate": 0.0}, {"rate": math.nan}, {"frames": 1}])
def test_limits_of_a_plan(plan: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"miss_rate|fit_frames"):
        ReusePlan(**plan)


@pytest.mark.parametrize("shape", [(1, 8, 128), (2, 577, 70), (1, 3, 5)])
def test_features_are_small_and_keep_distances(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    found = features_of(one)
    assert found.shape == (shape[0] * min(shape[1], 32), 64)
    assert feature_distance(found, found) == 0
    wanted = np.linalg.norm(one - other, axis=-1).max() / np.linalg.norm(one)
    assert feature_distance(found, features_of(other)) > wanted / 4


def test_the_report_page() -> None:
    document = kept()
    page = reuse_page(document, "a <camera>")
    assert "a &lt;camera&gt;" in page
    assert f"missed in these frames: {document['chosen']['missed']} of {document['chosen']['reused']} reused" in page
    assert page.count("<circle") == len(document["curve"]) + 2 - sum(one["rate"] > 0.2 for one in document["curve"])
    assert "<script" not in page
    assert "every frame is encoded" in reuse_page({**document, "chosen": None}, "a film")
