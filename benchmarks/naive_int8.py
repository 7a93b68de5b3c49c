"""Compares INT8 by ONNX Runtime's tool with each method of ``calibrate``: ``python benchmarks/naive_int8.py``.

Outlier channels and massive-activation tokens are added to the example checkpoint (``planted.py``), and the checkpoint
is exported. Its vision encoder is quantized by ONNX Runtime's ``quantize_static`` with MinMax per tensor, and by each
method of ``calibrate``. The table shows the cosine of the encoder's output to fp32, and the captions of scenes that
were not used for calibration.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from planted import plant
from reporting import CHECKPOINT, RESULTS, command, parser_of, system, write_json

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import VISION
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.agreement import cosine_similarity
from blip2edge.calibration.pipeline import calibrate
from blip2edge.choices import RANGE_METHODS
from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.training.data.scenes import Scene, scenes
from blip2edge.training.metrics.exact import exact_match

CALIBRATION_SEED, EVALUATION_SEED, PLANT_SEED = 4242, 1000, 99
NAIVE = "onnxruntime MinMax per tensor"


class Pixels(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
    """Returns calibration pictures, one at a time, to ONNX Runtime's quantization tool."""

    def __init__(self, batches: Iterator[np.ndarray[Any, Any]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch}


def naive_bundle(parent: Path, target: Path, pictures: Sequence[Scene]) -> None:
    """Copies a bundle and quantizes its vision encoder by ``quantize_static`` with symmetric MinMax ranges."""
    shutil.copytree(parent, target)
    bundle = Bundle.open(parent)
    record = bundle.graph(VISION)
    prepare = Preprocessing.from_json(bundle.manifest.preprocessing)
    path = target / record.spec.file
    quantize_static(
        str(parent / record.spec.file),
        str(path),
        Pixels(prepare.batch([scene.picture]) for scene in pictures),
        quant_format=QuantFormat.QDQ,
        per_channel=False,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
    files = {name: seal for name, seal in bundle.manifest.files.items() if name not in record.data_files}
    for name in record.data_files:
        (target / name).unlink()
    files[path.name] = FileRecord.of(path)
    graphs = {**bundle.manifest.graphs, VISION: replace(record, precision="int8", parity=(), data_files=())}
    replace(bundle.manifest, files=files, graphs=graphs).write(target)


def figures(parent: Path, bundle: Path, wanted: Sequence[str], heldout: Sequence[Scene]) -> dict[str, Any]:
    """Compares a bundle with the fp32 bundle.

    Returns the cosine of the vision encoders' outputs, the share of captions that are equal in both bundles, and the
    share of captions that are right.
    """
    prepare = Preprocessing.from_json(Bundle.open(parent).manifest.preprocessing)
    sessions = [OnnxRuntimeSession(root / f"{VISION}.onnx", 1) for root in (parent, bundle)]
    cosines = []
    for scene in heldout[:64]:
        pixels = prepare.batch([scene.picture])
        first, second = (session.run({"pixel_values": pixels})["image_embeds"] for session in sessions)
        cosines.append(cosine_similarity(first, second))
    said = captions(bundle, heldout)
    same = np.mean([one == two for one, two in zip(wanted, said, strict=True)])
    return {
        "cosine": round(float(np.mean(cosines)), 5),
        "lowest_cosine": round(min(cosines), 5),
        "same_captions": round(float(same), 4),
        "exact_match": exact_match(said, [scene.caption for scene in heldout]),
    }


def captions(bundle: Path, pictures: Sequence[Scene]) -> list[str]:
    """Captions pictures with a bundle; returns the captions."""
    captioner = Captioner.load(bundle, backend="cpu", threads=1)
    results = captioner.caption_many([scene.picture for scene in pictures], batch_size=16)
    return [result.text for result in results]


def measure(folder: Path, pictures: int, heldout: int) -> dict[str, dict[str, Any]]:
    """Quantizes the vision encoder with each method, and compares the captions with those in fp32.

    Returns one row for fp32, then one row for each method.
    """
    plant(
        CHECKPOINT,
        folder / "checkpoint",
        [scene.picture for scene in scenes(64, split="train", seed=PLANT_SEED)],
    )
    parent = export_checkpoint(folder / "checkpoint", folder / "parent").bundle
    seen = list(scenes(pictures, split="train", seed=CALIBRATION_SEED))
    images = folder / "images"
    images.mkdir()
    for index, scene in enumerate(seen):
        scene.picture.save(images / f"{index:04d}.png")
    unseen = list(scenes(heldout, split="heldout", seed=EVALUATION_SEED))
    wanted = captions(parent, unseen)
    rows = {"fp32": figures(parent, parent, wanted, unseen)}
    naive_bundle(parent, folder / "naive", seen)
    rows[NAIVE] = figures(parent, folder / "naive", wanted, unseen)
    for method in RANGE_METHODS:
        bundle = folder / method
        report = calibrate(parent, bundle, images=images, method=method, weights=None, threads=1)
        kept = {name: reason for name, reason in report.graphs[VISION].kept_float.items() if "rounding" in reason}
        rows[method] = figures(parent, bundle, wanted, unseen) | {"left_in_float": kept}
    return rows


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--pictures", type=int, default=200, help="number of calibration pictures (200)")
    parser.add_argument("--heldout", type=int, default=500, help="number of other pictures to caption (500)")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        rows = measure(Path(folder), options.pictures, options.heldout)
    print(f"{'way':32} {'cosine':>8} {'lowest':>8} {'same captions':>14} {'right':>7}")
    for name, row in rows.items():
        print(
            f"{name:32} {row['cosine']:8.5f} {row['lowest_cosine']:8.5f} {row['same_captions']:14.1%} "
            f"{row['exact_match']:7.1%}"
        )
    document = {
        "command": command(),
        "machine": system("onnx", "onnxruntime", "numpy", "torch"),
        "model": "examples/checkpoint with planted outlier channels and massive tokens (benchmarks/planted.py)",
        "pictures": options.pictures,
        "heldout": options.heldout,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    write_json(RESULTS / "naive-int8.json", document)


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(3)
    run_script(main)
