"""Makes the bundles of the example checkpoint that steps of ``gpu.py`` run, each with its copy for CUDA."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpu_common import BUNDLES, prepared
from reporting import ROOT

PRECISIONS = ("fp32", "fp16", "int4")


def make_bundles(folder: Path, precisions: Sequence[str] = PRECISIONS, copies: bool = True) -> None:
    """Exports the example checkpoint in the given precisions, and calibrates ``int4`` from ``fp16``.

    Args:
        folder: Directory of the bundles; each is named by its precision.
        precisions: Names out of :data:`PRECISIONS`.
        copies: Whether to make the bundles' optimized copies for the backend ``cuda``.
    """
    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.export.pipeline import export_checkpoint
    from blip2edge.optimization.pipeline import optimize

    examples = ROOT / "examples"
    for precision in precisions:
        if precision == "int4":
            if "fp16" not in precisions:
                make_bundles(folder, ("fp16",), copies=False)
            pictures = examples / "pictures"
            calibrate(folder / "fp16", folder / "int4", images=pictures, activations=(), weights="int4", force=True)
        else:
            export_checkpoint(examples / "checkpoint", folder / precision, precision=precision, force=True)
        if copies:
            optimize(folder / precision, "cuda")


@contextmanager
def example_bundles(dry: bool, precisions: Sequence[str], copies: bool = True) -> Iterator[dict[str, Path]]:
    """Yields bundles of the example checkpoint by precision; they can be changed, and are removed at the end."""
    with (
        prepared(BUNDLES, dry, lambda folder: make_bundles(folder, precisions, copies)) as source,
        tempfile.TemporaryDirectory() as scratch,
    ):
        yield {name: Path(shutil.copytree(source / name, Path(scratch) / name)) for name in precisions}
