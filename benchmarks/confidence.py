"""Checks how well a fitted confidence predicts whether a caption is right, on the example checkpoint in fp32 and INT8.

    python benchmarks/confidence.py --work DIR --write benchmarks/results/confidence.json
    python benchmarks/confidence.py --page docs/confidence.md          # the tables, from the written results

Scenes with held-out pairs of objects are disturbed as by a camera: no change, noise, blur, occlusion or JPEG, each
with a random strength. For each bundle, ``calibrate --references`` fits three maps from the features of a caption to
its confidence, on pictures that no test uses:

- ``clean``: on undisturbed scenes, nearly all of which the model captions correctly. All other pictures differ from
  these scenes.
- ``noise``: on noisy scenes alone. Blur, occlusion and JPEG are then kinds of disturbance that the fit did not have.
- ``mixed``: on all five kinds in equal parts.

Each map is tested on scenes that the fit did not use. The script measures:

- the calibration error: on the kinds of disturbance in the fit, on each kind alone, and with stronger noise than in the
  fit (``strong noise``);
- the share of right captions in that half of the pictures which has the higher confidence;
- the confidence for pictures without content (grey, noise, gradients), which have no right caption.

A caption is right if it equals the scene's only caption.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from reporting import CHECKPOINT, RESULTS, parser_of, with_tables, write_result

from blip2edge import Captioner, __version__
from blip2edge.calibration.confidence.figures import accuracy_at, calibration_error, figures, separation
from blip2edge.cli import main as command_line
from blip2edge.cli import run_script
from blip2edge.runtime.decoding.confidence import ConfidenceMap, features
from blip2edge.runtime.decoding.generate import log_probability
from blip2edge.training.data.scenes import PICTURE_SIZE, scenes

FIT_SEED, TEST_SEED, EMPTY_SEED, RANGES_SEED = 71, 80, 10, 11
Picture = Image.Image
Change = Callable[[Picture, np.random.Generator], Picture]


def noise(low: float, high: float) -> Change:
    """Adds Gaussian noise with a random standard deviation, for pixel values from 0 to 255."""

    def change(picture: Picture, rng: np.random.Generator) -> Picture:
        pixels = np.asarray(picture, np.float64)
        disturbed = pixels + rng.normal(0, rng.uniform(low, high), pixels.shape)
        return Image.fromarray(np.clip(disturbed, 0, 255).astype(np.uint8))

    return change


def blur(picture: Picture, rng: np.random.Generator) -> Picture:
    """Blurs a picture of 64 x 64 pixels with a random radius of at most 4 pixels."""
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 4)))


def occlusion(picture: Picture, rng: np.random.Generator) -> Picture:
    """Covers a square, whose side is at most 39 pixels, with grey."""
    side = int(rng.integers(0, 40))
    left, upper = (int(value) for value in rng.integers(0, PICTURE_SIZE - side + 1, 2))
    covered = picture.copy()
    covered.paste((128, 128, 128), (left, upper, left + side, upper + side))
    return covered


def jpeg(picture: Picture, rng: np.random.Generator) -> Picture:
    """Compresses a picture as JPEG with a random quality from 1 to 19 (Pillow's scale, whose best quality is 95)."""
    file = BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(1, 20)))
    return Image.open(file).convert("RGB")


KINDS: dict[str, Change] = {
    "clean": lambda picture, rng: picture,
    "noise": noise(0, 90),
    "blur": blur,
    "occlusion": occlusion,
    "jpeg": jpeg,
}
TESTS = {**KINDS, "strong noise": noise(60, 120)}
FITS = {"clean": ("clean",), "noise": ("noise",), "mixed": tuple(KINDS)}


def disturbed(kinds: tuple[str, ...], count: int, seed: int) -> Iterator[tuple[Picture, str]]:
    """Yields disturbed pictures with their right captions; the kinds of disturbance alternate."""
    rng = np.random.default_rng([seed, len(kinds)])
    for number, scene in enumerate(scenes(count, split="heldout", seed=seed)):
        yield TESTS[kinds[number % len(kinds)]](scene.picture, rng), scene.caption


def empty(count: int) -> Iterator[Picture]:
    """Yields pictures without content, in turn: a single grey, uniform noise, a gradient of two colours."""
    rng = np.random.default_rng(EMPTY_SEED)
    size = (PICTURE_SIZE, PICTURE_SIZE)
    for number in range(count):
        if number % 3 == 0:
            pixels = np.full((*size, 3), rng.integers(0, 256))
        elif number % 3 == 1:
            pixels = rng.integers(0, 256, (*size, 3))
        else:
            ends = rng.integers(0, 256, (2, 3))
            pixels = ends[0] + (ends[1] - ends[0]) * np.linspace(0, 1, PICTURE_SIZE)[:, None, None]
            pixels = np.broadcast_to(pixels, (*size, 3))
        yield Image.fromarray(pixels.astype(np.uint8))


def blip2edge(*arguments: str) -> None:
    """Runs a command in this process."""
    with redirect_stdout(StringIO()):
        status = command_line(list(arguments))
    if status:
        raise SystemExit(status)


def make_bundles(work: Path) -> dict[str, Path]:
    """Exports the example checkpoint and calibrates it to INT8; returns the paths of both bundles, by precision."""
    bundles = {"fp32": work / "fp32", "int8": work / "int8"}
    if not bundles["int8"].is_dir():
        ranges = work / "ranges"
        ranges.mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes(128, split="train", seed=RANGES_SEED)):
            scene.picture.save(ranges / f"{number:03d}.png")
        blip2edge("export", str(CHECKPOINT), "-o", str(bundles["fp32"]), "--force", "--no-optimize")
        images = ("--images", str(ranges), "--no-optimize", "--force")
        blip2edge("calibrate", str(bundles["fp32"]), "-o", str(bundles["int8"]), *images)
    return bundles


def write_references(folder: Path, kinds: tuple[str, ...], count: int) -> None:
    """Writes a folder of disturbed pictures with captions, which can be given as `--references`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, caption) in enumerate(disturbed(kinds, count, FIT_SEED)):
        picture.save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(caption + "\n", encoding="utf-8")


def fitted_map(bundle: Path, folder: Path, output: Path) -> tuple[ConfidenceMap, dict[str, Any]]:
    """Fits a confidence map with the command `calibrate`; returns the map, and its entry in the bundle's manifest."""
    blip2edge("calibrate", str(bundle), "-o", str(output), "--references", str(folder), "--no-optimize", "--force")
    record = json.loads((output / "bundle.json").read_text(encoding="utf-8"))["confidence"]["caption"]
    about = {name: record[name] for name in ("kind", "pictures", "right", "right_if", "brier")}
    return ConfidenceMap.from_json(record), {**about, "held_out": record["figures"]}


def captioned(captioner: Captioner, pairs: list[tuple[Picture, str]]) -> tuple[Any, Any]:
    """Captions pictures; returns the features of the captions ``[N, 3]``, and whether each caption is right ``[N]``."""
    results = captioner.caption_many([picture for picture, _ in pairs], batch_size=16)
    both = zip(results, pairs, strict=True)
    found = [(features(result.token_logprobs), result.text == text) for result, (_, text) in both]
    return np.array([row for row, _ in found]), np.array([right for _, right in found])


def error_if_true(confidences: Any, draws: int = 200) -> float:
    """Returns the mean calibration error that would be measured if the confidences were exactly right.

    This error is not 0, because the number of captions is limited.
    """
    rng = np.random.default_rng(0)
    found = [calibration_error(confidences, rng.random(len(confidences)) < confidences) for _ in range(draws)]
    return round(float(np.mean(found)), 4)


def rejected(confidences: Any, right: Any, empty_confidences: Any) -> dict[str, Any]:
    """Returns how well the confidence separates right captions from captions of pictures without content.

    The results are the area under the ROC curve (``auroc``), the share of pictures without content whose confidence is
    below 0.5 (``below_half``), and the highest confidence of these pictures.
    """
    values = np.concatenate([confidences[right], empty_confidences])
    good = np.arange(len(values)) < right.sum()
    return {
        "auroc": round(separation(values, good) or 0.0, 4),
        "below_half": round(float((empty_confidences < 0.5).mean()), 4),
        "highest_confidence": round(float(empty_confidences.max()), 4),
    }


def measure(bundle: Path, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fits and tests all confidence maps of one bundle; returns the measured values."""
    with Captioner.load(bundle, backend="cpu", threads=1) as captioner:
        tests = {
            kind: captioned(captioner, list(disturbed((kind,), options.scenes, TEST_SEED + at)))
            for at, kind in enumerate(TESTS)
        }
        mixed = captioned(captioner, list(disturbed(tuple(KINDS), options.scenes, TEST_SEED + len(TESTS))))
        nothing, _ = captioned(captioner, [(picture, "") for picture in empty(options.empty)])
    found: dict[str, Any] = {"accuracy": {kind: round(float(right.mean()), 4) for kind, (_, right) in tests.items()}}
    for name, kinds in FITS.items():
        folder = options.work / f"references-{name}"
        if not folder.is_dir():
            write_references(folder, kinds, options.fit)
        fitted, about = fitted_map(bundle, folder, options.work / f"{precision}-{name}")
        same = tests.get(name, mixed)
        own = fitted.probabilities(same[0])
        noisy = fitted.probabilities(tests["noise"][0])
        found[name] = {
            "fit": about,
            "same_distribution": {**figures(own, same[1]), "calibration_error_if_true": error_if_true(own)},
            "calibration_error": {
                kind: round(calibration_error(fitted.probabilities(rows), right), 4)
                for kind, (rows, right) in tests.items()
            },
            "surer_half": {
                kind: round(accuracy_at(fitted.probabilities(rows), right, 0.5), 4)
                for kind, (rows, right) in tests.items()
            },
            "without_content": {
                kind: rejected(fitted.probabilities(tests[kind][0]), tests[kind][1], fitted.probabilities(nothing))
                for kind in ("clean", "noise")
            },
        }
        right = tests["noise"][1]
        gain = accuracy_at(noisy, right, 0.5) - right.mean()
        found[name]["gain_at_half_coverage_on_noise"] = round(float(gain), 4)
    return found


def cost(vocabulary: int, runs: int = 300) -> float:
    """Returns the least measured time to compute the log-probability of one token, in milliseconds."""
    logits = np.random.default_rng(0).normal(0, 3, vocabulary).astype(np.float32)
    least = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        log_probability(logits, 5)
        least = min(least, time.perf_counter() - start)
    return round(least * 1e3, 4)


def tables(found: dict[str, Any]) -> str:
    """Returns the tables of ``docs/confidence.md``."""
    head = [f"{name} {precision}" for precision in found["bundles"] for name in FITS]
    columns = [found["bundles"][precision][name] for precision in found["bundles"] for name in FITS]
    same: list[Callable[[dict[str, Any]], float]] = [
        lambda one: one["same_distribution"]["calibration_error"],
        lambda one: one["same_distribution"]["calibration_error_if_true"],
        lambda one: one["same_distribution"]["accuracy"],
        lambda one: dict(map(tuple, one["same_distribution"]["coverage"]))[0.5],
    ]
    rows = [
        (title, [f"{100 * value(one):.1f} %" for one in columns])
        for title, value in zip(
            (
                "calibration error, same distribution",
                "the same by chance alone",
                "right, same distribution",
                "right in the surer half",
            ),
            same,
            strict=True,
        )
    ]
    rows += [
        (f"calibration error on {kind}", [f"{100 * one['calibration_error'][kind]:.1f} %" for one in columns])
        for kind in TESTS
    ]
    empty_rows = [one["without_content"] for one in columns]
    auroc = [f"{one['clean']['auroc']:.4f} / {one['noise']['auroc']:.4f}" for one in empty_rows]
    rows += [
        (
            "points that the surer half gains on noise",
            [f"{100 * one['gain_at_half_coverage_on_noise']:.1f}" for one in columns],
        ),
        ("without content: confidence below 0.5", [f"{100 * one['clean']['below_half']:.1f} %" for one in empty_rows]),
        ("without content: AUROC to right clean / noisy captions", auroc),
        ("chosen map", [one["fit"]["kind"] for one in columns]),
    ]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    return "\n".join([*lines, *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows)])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", metavar="DIR", type=Path, help="directory for bundles and pictures")
    parser.add_argument("--page", metavar="FILE", type=Path, help="write the tables of the results into FILE, and stop")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the results to FILE")
    parser.add_argument("--fit", type=int, default=2000, help="number of pictures on which a map is fitted (2000)")
    parser.add_argument("--scenes", type=int, default=2000, help="number of pictures of each test (2000)")
    parser.add_argument("--empty", type=int, default=300, help="number of pictures without content (300)")
    options = parser.parse_args()
    if options.page is not None:
        known = json.loads((RESULTS / "confidence.json").read_text(encoding="utf-8"))
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(
            with_tables(page, {"confidence": lambda: tables(known)}, "confidence.py"), encoding="utf-8"
        )
        return
    if options.work is None:
        parser.error("--work is needed")
    bundles = make_bundles(options.work)
    found = {
        "blip2edge": __version__,
        "fit_pictures": options.fit,
        "test_pictures": options.scenes,
        "empty_pictures": options.empty,
        "token_ms": {str(vocabulary): cost(vocabulary) for vocabulary in (1100, 32128, 50272)},
        "bundles": {precision: measure(path, precision, options) for precision, path in bundles.items()},
    }
    print(json.dumps(found, indent=2))
    write_result(options.write, **found)


if __name__ == "__main__":
    run_script(main)
