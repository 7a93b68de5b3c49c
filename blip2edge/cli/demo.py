"""``blip2edge demo``: export, calibrate and caption with the checkpoint that comes with the package."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import blip2edge
from blip2edge.cli.calibrate import report_table as calibration_table
from blip2edge.cli.export import report_table
from blip2edge.cli.inspect import bundle_bytes
from blip2edge.cli.next_steps import print_next, quoted
from blip2edge.cli.optimize import optimized
from blip2edge.cli.table import difference, size, table
from blip2edge.errors import BackendError, OutputError, option
from blip2edge.packages import install_command, missing
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.calibration.results import CalibrationReport
    from blip2edge.export.pipeline import ExportReport
    from blip2edge.runtime.captioning.captioner import CaptionResult

EXAMPLES = Path(blip2edge.__file__).parent / "examples"
CHECKPOINT = EXAMPLES / "checkpoint"
PICTURES = EXAMPLES / "pictures"
NEEDED = ("torch", "onnx", "onnxscript", "onnxruntime")
CALIBRATION_SCENES, CALIBRATION_SEED = 128, 4242  # scenes that neither training nor evaluation uses
EXPORT_PYTHON = (3, 11)  # required by transformers and the newest ONNX Runtime
STAGES = ("preprocess", "vision", "bridge", "prefill", "decode", "total")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``demo``."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="directory that the bundle is written to (default: in the user's cache directory)",
    )


def run(options: argparse.Namespace) -> int:
    """Export the miniature checkpoint, verify it, calibrate it, caption the pictures, print the measured values."""
    started = time.monotonic()
    problem = demo_problem()
    if problem is not None:
        raise problem
    target = _target(options.out)
    from blip2edge.export.pipeline import export_checkpoint
    from blip2edge.picture_files import PICTURE_SUFFIXES
    from blip2edge.runtime.captioning.captioner import Captioner

    with Progress() as progress:
        report = export_checkpoint(CHECKPOINT, target, force=True, progress=progress)
        calibrated = _calibrate(report.bundle, progress)
    for bundle in (report.bundle, calibrated.bundle):
        optimized(bundle)
    pictures = sorted(path for path in PICTURES.iterdir() if path.suffix in PICTURE_SUFFIXES)
    captioner = Captioner.load(report.bundle, backend="cpu")
    captioner.caption(pictures[0])  # warm-up: the first run also allocates memory
    results = list(captioner.caption_many(pictures))
    print(report_table(report))
    print()
    print(calibration_table(calibrated))
    print()
    print(_captions(pictures, results))
    print()
    quantised = Captioner.load(calibrated.bundle, backend="cpu").caption_many(pictures)
    same = sum(one.text == two.text for one, two in zip(quantised, results, strict=True))
    print("\n".join([*_closing(report), _int8(calibrated, same, len(pictures))]))
    print(f"\nThe whole demo took {time.monotonic() - started:.1f} s")
    print_next(
        f"blip2edge caption {quoted(pictures[0])} -b {quoted(report.bundle)}",
        f"blip2edge serve {quoted(report.bundle)}",
    )
    return 0


def demo_problem() -> BackendError | None:
    """Checks whether the demo can run: returns an error if a package or the checkpoint is missing, else None.

    No package is imported.
    """
    import platform

    absent = missing(NEEDED)
    if absent:
        fix = install_command("demo")
        if sys.version_info < EXPORT_PYTHON:
            fix = f"on Python 3.11 or newer, not {platform.python_version()}: {fix}"
        return BackendError(f"the demo needs these packages, which are not installed: {', '.join(absent)}", fix)
    if not (CHECKPOINT / "config.json").is_file():
        return BackendError(
            f"the example checkpoint is missing: there is no {CHECKPOINT}",
            "install blip2edge again, from a complete wheel or clone",
        )
    return None


def _target(out: Path | None) -> Path:
    """Returns the bundle's directory: in the user's cache, or `out`, which may be absent, empty or an earlier bundle.

    Raises:
        OutputError: `out` holds something else.
    """
    from blip2edge.bundle.manifest import MANIFEST
    from blip2edge.bundle.user_cache import cache_directory

    if out is None:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        return directory / "demo"
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not a bundle", f"give {option('out')} a new or an empty directory")
    return out


def _calibrate(parent: Path, progress: Progress) -> CalibrationReport:
    """Makes an INT8 bundle next to the exported bundle, calibrated on scenes like the training scenes."""
    import tempfile

    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.training.data.scenes import scenes

    with tempfile.TemporaryDirectory() as folder:
        for index, scene in enumerate(scenes(CALIBRATION_SCENES, split="train", seed=CALIBRATION_SEED)):
            scene.picture.save(Path(folder) / f"{index:03d}.png")
        target = parent.with_name(f"{parent.name}-int8")
        return calibrate(parent, target, images=folder, force=True, progress=progress)


def _int8(report: CalibrationReport, same: int, pictures: int) -> str:
    """Returns a line with the size of the INT8 bundle, and the number of pictures whose captions did not change."""
    from blip2edge.bundle.bundle import Bundle

    count = size(bundle_bytes(Bundle.open(report.bundle).manifest))
    return f"INT8 bundle               {count}, the same caption for {same} of {pictures} pictures: {report.bundle}"


def _captions(pictures: list[Path], results: list[CaptionResult]) -> str:
    rows = []
    for picture, result in zip(pictures, results, strict=True):
        times = [f"{result.timings_ms[stage]:.1f}" for stage in STAGES]
        rows.append([picture.name, " ".join(result.text.split()), *times])
    header = ["picture", "caption", *STAGES]
    header[-1] = "total ms"
    return table(header, rows, right=range(2, len(header)))


def _closing(report: ExportReport) -> list[str]:
    """Returns lines with the bundle's size, the largest difference from torch, and why TensorRT was not run."""
    from blip2edge.bundle.bundle import Bundle

    manifest = Bundle.open(report.bundle).manifest
    worst = difference(max(graph.max_difference for graph in report.graphs))
    return [
        f"bundle size               {size(bundle_bytes(manifest))}",
        f"max difference from torch {worst}",
        f"TensorRT                  not run: {_tensorrt()}",
    ]


def _tensorrt() -> str:
    """Returns the reason why no engine ran: the driver or TensorRT is missing, or the demo needs only the CPU."""
    from blip2edge.runtime.bench.doctor import diagnose

    found = [check for check in diagnose() if check.name in ("NVIDIA driver", "TensorRT")]
    missing = [f"{check.name}: {check.detail}" for check in found if not check.ok]
    return "; ".join(missing) or "the demo runs on the CPU; make the engines with: blip2edge build BUNDLE"
