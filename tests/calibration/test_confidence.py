"""Confidence: the fit, its figures, and how a fitted bundle answers on each path."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime", reason="captions of the cpu backend")
pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

from blip2edge import Captioner
from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import Manifest, read_manifest
from blip2edge.calibration.confidence.figures import accuracy_at, calibration_error, reliability, separation
from blip2edge.calibration.confidence.fit import (
    CANDIDATES,
    MOST_KNOTS,
    Score,
    fit_map,
    isotonic,
    logistic,
    probabilities,
    thinned,
)
from blip2edge.calibration.confidence.page import BEGIN, with_section
from blip2edge.calibration.confidence.pipeline import LEAST, copy_with_confidence
from blip2edge.calibration.confidence.references import References
from blip2edge.calibration.pipeline import calibrate
from blip2edge.calibration.sealing import seal
from blip2edge.cli import main
from blip2edge.cli.caption import shown_text
from blip2edge.errors import BundleError, DataError, UsageError
from blip2edge.limits import Limits
from blip2edge.runtime.decoding.confidence import Confidence, ConfidenceMap, features
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.options import GenerationOptions
from tests.confident import NEW, Drawn, drawn_references, fit_on_drawings, pictures, written_references
from tests.drawing import draw_pictures

RNG = np.random.default_rng(0)
FIT = "blip2edge calibrate BUNDLE -o OUT --references FILE"


def drawn_rows(count: int, sharpness: float = 1.0) -> tuple[Any, Any]:
    """Features of texts whose chance of being right is the logistic function of the sum's feature."""
    rows = RNG.normal(0, 2, (count, 3))
    return rows, RNG.random(count) < 1 / (1 + np.exp(-sharpness * rows[:, 2]))


# The fit


def test_logistic_regression_finds_the_weights_of_its_data() -> None:
    rows, right = drawn_rows(20000, 1.5)
    score = logistic((2,))(rows, right)
    assert score.weights[:2] == (0.0, 0.0)
    assert score.weights[2] == pytest.approx(1.5, abs=0.1)
    assert score.offset == pytest.approx(0.0, abs=0.1)


def test_isotonic_regression_pools_what_falls() -> None:
    """Right 0, 1, 0, 1, 1 in the order of the score: the falling pair becomes its mean."""
    rows = np.zeros((5, 3))
    rows[:, 2] = [1, 2, 3, 4, 5]
    found = isotonic(logistic((2,)))(rows, np.array([False, True, False, True, True]))
    assert found.knots[1] == (0.0, 0.5, 1.0)
    assert list(found.knots[0]) == sorted(found.knots[0])


def test_the_surest_block_is_kept() -> None:
    blocks = [[float(at)] for at in range(3 * MOST_KNOTS + 2)]
    kept = thinned(blocks)
    assert (len(kept), kept[0], kept[-1]) == (MOST_KNOTS, blocks[0], blocks[-1])
    assert thinned(blocks[:5]) == blocks[:5]


def test_texts_of_one_picture_are_held_out_together() -> None:
    """Each picture twice, with a feature that names it: its other text does not help to predict it."""
    rng = np.random.default_rng(1)
    rows, right = np.repeat(rng.normal(0, 2, (200, 3)), 2, axis=0), np.repeat(rng.random(200) < 0.5, 2)
    trained: list[int] = []

    def fit(train: Any, right: Any) -> Score:
        trained.append(len(set(train[:, 2].tolist())))
        return Score(0.0, (0.0, 0.0, 1.0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blip2edge.calibration.confidence.fit.CANDIDATES", {"one": fit})
        fit_map(rows, right, [at // 2 for at in range(400)])
    assert trained == [180] * 10 + [200]


@pytest.mark.parametrize("right", [np.ones(50, bool), np.zeros(50, bool)], ids=["all right", "all wrong"])
def test_one_kind_of_text_gives_no_certainty(right: Any) -> None:
    rows = RNG.normal(0, 1, (50, 3))
    fitted = fit_map(rows, right)
    found = probabilities(fitted.score, rows, fitted.bounds)
    assert ((found > 0) & (found < 1)).all()
    assert (found > 0.5).all() == bool(right[0])


def test_the_chosen_map_has_the_least_brier_score_and_is_true() -> None:
    rows, right = drawn_rows(4000)
    fitted = fit_map(rows, right)
    assert set(fitted.brier) == set(CANDIDATES)
    assert fitted.brier[fitted.kind] == min(fitted.brier.values())
    more, truth = drawn_rows(4000)
    assert calibration_error(probabilities(fitted.score, more, fitted.bounds), truth) < 0.04
    order = np.argsort(more[:, 2])
    if fitted.kind.endswith("sum"):
        assert (np.diff(probabilities(fitted.score, more[order], fitted.bounds)) >= -0.05).all()


def test_figures() -> None:
    confidences, right = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, True, True, True])
    assert accuracy_at(confidences, right, 0.5) == 1.0
    assert accuracy_at(confidences, right, 1.0) == 0.75
    assert calibration_error(confidences, right) == pytest.approx((0.1 + 0.8 + 0.2 + 0.1) / 4)
    assert [row["texts"] for row in reliability(confidences, right, 2)] == [2, 2]
    assert separation(confidences, right) == 1.0
    assert separation(confidences, np.ones(4, bool)) is None
    values, truth = RNG.integers(0, 5, 60).astype(float), RNG.random(60) < 0.5
    pairs = [(one > other) + 0.5 * (one == other) for one in values[truth] for other in values[~truth]]
    assert separation(values, truth) == pytest.approx(float(np.mean(pairs)))


def test_features_rise_with_the_log_probabilities() -> None:
    assert (features([-0.1, -0.2]) > features([-0.1, -0.3])).all()
    assert np.isfinite(features([-9999.0, 0.0])).all()
    assert np.isfinite(features([])).all()


# A fitted bundle


@pytest.fixture(scope="module")
def captioner(confident_bundle: Path) -> Captioner:
    return Captioner.load(confident_bundle, backend="cpu", threads=1)


def test_the_hash_of_references_is_that_of_their_pixels() -> None:
    """A picture that is replaced under its old name counts as another one."""
    first, second = pictures(2)

    def sha256(picture: Image.Image, right: str = "a square") -> str:
        return References([Drawn("0.png", picture, right)], "equal").sha256

    assert sha256(first) == sha256(first.copy())
    assert len({sha256(first), sha256(second), sha256(first, "a circle"), sha256(first.convert("L"))}) == 4


def test_the_copy_has_the_parents_files_and_a_report(
    confident_bundle: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, parent = Bundle.open(confident_bundle).manifest, Bundle.open(tiny_bundle).manifest
    assert {name: ours.files[name] for name in parent.files} == dict(parent.files)
    assert set(ours.files) - set(parent.files) == {"report.json", "report.html"}
    record = ours.confidence["caption"]
    assert (record["pictures"], record["right"], record["right_if"]) == (32, 16, "surer than half of all")
    assert record["figures"]["accuracy"] == 0.5
    assert json.loads((confident_bundle / "report.json").read_text())["confidence"]["caption"] == record
    page = (confident_bundle / "report.html").read_text()
    assert "expected calibration error" in page
    assert page.count("<svg") == 2
    assert main(["inspect", str(confident_bundle)]) == 0
    assert "on 32 pictures; right: surer than half of all" in capsys.readouterr().out
    assert with_section(page, "x", ours.confidence).count(BEGIN) == 1  # an older part is replaced


def test_surer_captions_have_a_higher_confidence(captioner: Captioner) -> None:
    results = list(captioner.caption_many(pictures(12), max_new_tokens=NEW, batch_size=4))
    assert all(result.confidence is not None for result in results)
    ordered = sorted(results, key=lambda result: result.logprob)
    assert (ordered[-1].confidence or 0) > (ordered[0].confidence or 1)
    values = json.loads(json.dumps(results[0].to_json()))
    assert (values["logprob"], values["confidence"]) == (round(results[0].logprob, 6), results[0].confidence)


def test_abstaining_gives_no_text(captioner: Captioner) -> None:
    drawn = pictures(12)
    plain = list(captioner.caption_many(drawn, max_new_tokens=NEW, batch_size=4))
    limit = sorted(result.confidence or 0 for result in plain)[6]
    found = list(captioner.caption_many(drawn, max_new_tokens=NEW, batch_size=4, abstain_below=limit))
    for result, before in zip(found, plain, strict=True):
        assert result.tokens == before.tokens
        assert result.confidence == pytest.approx(before.confidence, abs=0.02)
        abstained = (result.confidence or 0) < limit
        assert (result.text, result.finish_reason) == (
            ("", "abstained") if abstained else (before.text, before.finish_reason)
        )
    assert {result.finish_reason for result in found} > {"abstained"}


def test_a_scheduler_publishes_no_text_before_it_is_sure(captioner: Captioner) -> None:
    options = captioner.options(max_new_tokens=NEW, abstain_below=1.0)
    with captioner.scheduler(max_batch=2) as scheduler:
        requests = [scheduler.submit(picture, options) for picture in pictures(2)]
        assert [list(request.pieces()) for request in requests] == [[], []]
        assert [request.result().finish_reason for request in requests] == ["abstained"] * 2


@pytest.mark.parametrize(
    ("options", "named", "fix"),
    [
        ({"num_beams": 2}, "num_beams", f"{FIT} --num-beams 2"),
        ({"temperature": 0.7, "seed": 1}, "temperature", "; leave temperature out: calibrate has no flag for it"),
        ({"stop": ("a",)}, "stop", "; leave stop out: calibrate has no flag for it"),
        ({"repetition_penalty": 1.5}, "repetition_penalty", f"{FIT} --repetition-penalty 1.5"),
        ({"prompt": "a photo of"}, "was fitted with the bundle's own prompt", f"{FIT} --prompt 'a photo of'"),
        (
            {"stop": ("a",), "num_beams": 3, "length_penalty": 0.5},
            "length_penalty, num_beams, stop",
            f"it; fit the confidence on pictures with known captions: {FIT} --num-beams 3 --length-penalty 0.5",
        ),
    ],
    ids=lambda value: str(value),
)
def test_other_options_or_prompts_have_no_confidence(
    captioner: Captioner, options: dict[str, Any], named: str, fix: str
) -> None:
    picture = draw_pictures(1)[0]
    assert captioner.caption(picture, max_new_tokens=NEW, **options).confidence is None
    with pytest.raises(UsageError) as refused:
        captioner.caption(picture, max_new_tokens=NEW, abstain_below=0.5, **options)
    assert named in str(refused.value)
    assert fix in str(refused.value)


def test_a_text_that_is_cut_elsewhere_has_no_confidence(captioner: Captioner) -> None:
    result = captioner.caption(
        draw_pictures(1)[0], max_new_tokens=NEW - 2, eos_token_ids=captioner.options().eos_token_ids
    )
    assert result.finish_reason == "length"
    assert result.confidence is None
    assert result.text
    given: dict[str, Any] = {"max_new_tokens": NEW - 2, "eos_token_ids": captioner.options().eos_token_ids}
    assert captioner.caption(draw_pictures(1)[0], abstain_below=0.0, **given).text == result.text


def test_drafts_and_seeds_change_no_confidence(captioner: Captioner) -> None:
    picture = draw_pictures(1)[0]
    plain = captioner.caption(picture, max_new_tokens=NEW)
    drafted = captioner.caption(picture, max_new_tokens=NEW, draft="lookup", seed=4)
    assert drafted.token_logprobs == pytest.approx(plain.token_logprobs, abs=1e-4)
    assert drafted.confidence == pytest.approx(plain.confidence, abs=0.02)


def test_a_stream_cannot_abstain(captioner: Captioner) -> None:
    with pytest.raises(UsageError, match="the confidence is known at the end"):
        captioner.stream(draw_pictures(1)[0], abstain_below=0.5)


def test_words_have_the_lowest_log_probability_of_their_tokens(captioner: Captioner) -> None:
    result = captioner.caption(draw_pictures(1)[0], max_new_tokens=12)
    words = captioner.words(result)
    assert " ".join(word.text for word in words) == " ".join(result.text.split())
    assert min(word.logprob for word in words) >= min(result.token_logprobs)
    assert {word.logprob for word in words} <= set(result.token_logprobs)


def test_questions_have_a_map_of_their_own(confident_bundle: Path, tmp_path: Path) -> None:
    report = copy_with_confidence(
        confident_bundle, tmp_path / "both", drawn_references(confident_bundle, 20, question="what is it?"), threads=1
    )[0]
    assert report.task == "ask"
    manifest = read_manifest(tmp_path / "both")
    assert set(manifest.confidence) == {"caption", "ask"}
    with Captioner.load(tmp_path / "both", backend="cpu", threads=1) as captioner:
        picture = draw_pictures(1)[0]
        assert captioner.ask(picture, "which colour is it?", max_new_tokens=NEW).confidence is not None
        assert captioner.caption(picture, max_new_tokens=NEW).confidence is not None


def test_a_map_belongs_to_its_precision(confident_bundle: Path) -> None:
    manifest = read_manifest(confident_bundle)
    text = Generated((), "eos", None, token_logprobs=(-0.1,))
    options = GenerationOptions(**{**manifest.confidence["caption"]["options"], "max_new_tokens": NEW})
    assert Confidence(manifest).of(text, options, None) is not None
    graphs = {name: replace(record, precision="int8") for name, record in manifest.graphs.items()}
    assert Confidence(replace(manifest, graphs=graphs)).of(text, options, None) is None


def test_a_quantised_bundle_has_no_map_of_its_parent(confident_bundle: Path, tmp_path: Path) -> None:
    context: Any = type("Context", (), {"staging": tmp_path, "parent": Bundle.open(confident_bundle)})
    sealed = seal(context, {})
    assert isinstance(sealed, Manifest)
    assert sealed.confidence == {}


def test_a_damaged_map_is_refused(confident_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(confident_bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "bundle.json"
    values = json.loads(path.read_text())
    for name, value in (("weights", [1.0]), ("knots", [[0.0], []]), ("bounds", [0.0, 2.0]), ("task", "guess")):
        values["confidence"]["caption"], before = (
            {**values["confidence"]["caption"], name: value},
            dict(values["confidence"]["caption"]),
        )
        path.write_text(json.dumps(values))
        with pytest.raises(BundleError, match=f"confidence.caption(.{name})?"):
            read_manifest(tmp_path / "bundle")
        values["confidence"]["caption"] = before


def test_a_map_as_json() -> None:
    found = ConfidenceMap("caption", None, {}, {"decoder": "fp32"}, 20, 0.5, (1.0, 0.0, 2.0), ((0.0, 1.0), (0.2, 0.7)))
    assert ConfidenceMap.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.confidence([-9999.0]) == pytest.approx(0.2)


# The command


def test_the_command_fits_and_caption_abstains(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = written_references(tmp_path / "refs", tiny_bundle), tmp_path / "out"
    flags = ["--references", str(folder), "--max-new-tokens", str(NEW), "--threads", "1", "--no-optimize"]
    assert main(["calibrate", str(tiny_bundle), "-o", str(output), *flags]) == 0
    said = capsys.readouterr()
    assert "confidence (caption): " in said.out
    assert "on 24 pictures of which 66.7% are right" in said.out  # apart from case and the full stop
    assert "at least 500 pictures with references are advised" in said.err
    picture = str(folder / "00.png")
    asked = ["caption", picture, "-b", str(output), "--json", "--max-new-tokens", str(NEW), "--threads", "1"]
    assert main(asked) == 0
    plain = json.loads(capsys.readouterr().out)
    assert 0 < plain["confidence"] < 1
    assert main([*asked, "--abstain-below", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == plain["text"]
    assert main([*asked, "--abstain-below", "1"]) == 0
    abstained = json.loads(capsys.readouterr().out)
    assert (abstained["text"], abstained["finish_reason"]) == ("", "abstained")
    assert main(["caption", picture, "-b", str(tiny_bundle), "--abstain-below", "0.5"]) == 2
    assert "blip2edge calibrate BUNDLE -o OUT --references FILE" in capsys.readouterr().err
    assert main(["caption", picture, "-b", str(output), "--stream", "--abstain-below", "0.5"]) == 2
    assert "cannot be combined: the confidence is known at the end" in capsys.readouterr().err


def test_what_the_command_refuses(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(tiny_bundle), "-o", str(tmp_path / "out")]) == 2
    assert "expected --images, --references or both, got neither" in capsys.readouterr().err
    flags = ["--images", str(tmp_path), "--right-at", "0.5"]
    assert main(["calibrate", str(tiny_bundle), "-o", str(tmp_path / "out"), *flags]) == 2
    assert "--right-at needs --references" in capsys.readouterr().err
    with pytest.raises(DataError, match=f"expected at least {LEAST} readable pictures"):
        fit_on_drawings(tiny_bundle, tmp_path / "out", count=LEAST - 1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="got neither"):
        calibrate(tiny_bundle, tmp_path / "out")


@pytest.mark.parametrize(
    "given",
    [
        {"formats": ["decoder=int8"]},
        {"method": "minmax"},
        {"weights": "int4"},
        {"weights": None},
        {"activations": []},
        {"drop_limit": 1.0},
        {"count": 3},
        {"limits": Limits(pixels=100)},
    ],
)
def test_options_of_the_quantization_need_pictures(given: dict[str, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    (name,) = given
    with pytest.raises(UsageError, match=rf"^{name} has no effect without images: nothing is quantized; give images"):
        calibrate(tiny_bundle, tmp_path / "out", **given)


def test_unsure_words_are_underlined_on_a_terminal(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    result = captioner.caption(draw_pictures(1)[0], max_new_tokens=12)
    assert shown_text(captioner, result) == result.text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    marked = shown_text(captioner, result)
    unsure = [word.text for word in captioner.words(result) if word.logprob < math.log(0.5)]
    assert unsure
    assert marked.count("\x1b[4m") == len(unsure)
    assert marked.replace("\x1b[4m", "").replace("\x1b[24m", "") == result.text.strip()
    assert shown_text(captioner, replace(result, text="", finish_reason="abstained")) == "(not sure)"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown_text(captioner, result) == result.text
