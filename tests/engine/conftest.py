"""Bundles of every family in every precision, traced once per test session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from blip2edge.bundle.schema import VISION

BundleOf = Callable[..., Path]
PICTURES = 2


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """A family's name and a precision (``fp32``) to its bundle; not to be changed.

    ``int8``: activations and weights of every graph of a captioner. ``int4``: the language model's weights.
    """
    pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
    pytest.importorskip("filelock", reason="workers share what they export")
    from filelock import FileLock

    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.export import pipeline
    from tests.drawing import draw_pictures
    from tests.engine.families import DECODERS, FAMILIES
    from tests.traces import shared_directory

    root = shared_directory(tmp_path_factory, "families")
    (root / "pictures").mkdir(exist_ok=True)

    def exported(name: str, precision: str) -> Path:
        checkpoint, bundle = root / name / "checkpoint", root / name / precision
        if not checkpoint.exists():
            FAMILIES[name](checkpoint)
        return pipeline.export_checkpoint(checkpoint, bundle, precision=precision).bundle

    @cache
    def make(name: str, precision: str = "fp32") -> Path:
        parent = None if precision in ("fp32", "fp16") else make(name)
        with FileLock(root / f"{name}.lock"):
            path = root / name / precision
            if path.exists():
                return path
            return exported(name, precision) if parent is None else calibrated(name, parent, precision)

    def calibrated(name: str, parent: Path, precision: str) -> Path:
        pictures = root / "pictures" / name
        pictures.mkdir(exist_ok=True)
        for index, picture in enumerate(draw_pictures(PICTURES)):
            picture.save(pictures / f"{index}.png")
        graphs = [path.stem for path in parent.glob("*.onnx")] if name in DECODERS else [VISION]
        options: dict[str, Any] = (
            {"weights": "int4"} if precision == "int4" else {"weights": "int8", "activations": graphs}
        )
        calibrate(parent, root / name / precision, images=pictures, threads=1, **options)
        return root / name / precision

    return make
