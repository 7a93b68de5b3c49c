"""``blip2edge build``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from blip2edge.cli.table import size, table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


def build(options: argparse.Namespace) -> int:
    """Build the engines and print what they are for."""
    from blip2edge.errors import EngineError

    if find_spec("onnx_ir") is None:
        raise EngineError(
            "graphs are read with onnx-ir, which is not installed",
            "install it: pip install 'blip2edge[build]'",
        )
    from blip2edge.engine.build import build_bundle

    with Progress() as progress:
        report = build_bundle(
            options.bundle,
            target=options.target,
            sm=options.sm,
            output=options.output,
            force=options.force,
            workspace=options.workspace,
            capacity=options.capacity,
            max_batch=options.max_batch,
            decoder=options.decoder,
            timing_cache=options.timing_cache,
            version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible,
            progress=progress,
            notify=lambda sentence: print(sentence, file=sys.stderr, flush=True),
        )
    rows = [
        [
            name,
            size(engine.size),
            f"{engine.seconds:.1f}",
            ", ".join(engine.profiles),
            counts(engine.asked),
            "needs a GPU to tell" if engine.landed is None else counts(engine.landed),
        ]
        for name, engine in report.engines.items()
    ]
    heads = ("engine", "size", "seconds", "profiles", "products asked in", "layers that got")
    print(table(heads, rows, right=(1, 2)))
    mark = report.fingerprint
    print(f"\n{report.directory}: TensorRT {mark.tensorrt} ({mark.target}), {', '.join(mark.gpus)}")
    print("built, not run: no GPU took part" if not mark.gpu else f"built on {mark.gpu}, not run yet")
    if report.bundle is not None:
        print(f"{report.bundle}: engines alone, for the machine that they were built for")
    return 0


def counts(numbers: Mapping[str, int]) -> str:
    """As `12 int8, 3 fp16`."""
    return ", ".join(f"{number} {name}" for name, number in numbers.items()) or "-"
