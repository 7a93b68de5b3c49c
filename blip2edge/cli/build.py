"""``blip2edge build``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.flag_types import positive_int
from blip2edge.cli.table import size, table
from blip2edge.packages import require
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``build``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument(
        "--target",
        choices=("tensorrt", "rtx"),
        default="tensorrt",
        help="tensorrt: build on the machine that runs the engines; rtx: build anywhere (tensorrt)",
    )
    parser.add_argument(
        "--sm",
        metavar="CC",
        type=positive_int,
        action="append",
        default=[],
        help="build for this compute capability (86 is 8.6) without that GPU; rtx only, may be repeated",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        help="write a bundle that holds engines and no ONNX file, for the device",
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")
    sizes = parser.add_argument_group("sizes", "limits of the engines; smaller ones take less memory")
    sizes.add_argument("--workspace", metavar="MiB", type=positive_int, help="largest scratch memory of the builder")
    sizes.add_argument(
        "--capacity",
        metavar="N",
        type=positive_int,
        help="largest number of tokens of prompt and answer (256 beyond the picture's, or the model's context)",
    )
    sizes.add_argument(
        "--max-batch",
        metavar="N",
        type=positive_int,
        help="rows (pictures times beams) decoded in one batch (8)",
    )
    kinds = parser.add_argument_group("kinds of engines")
    kinds.add_argument(
        "--decoder",
        choices=("constant", "concatenated"),
        default="constant",
        help="constant: a KV cache of constant size, which the TensorRT runtime needs; concatenated: one that grows "
        "(constant)",
    )
    kinds.add_argument(
        "--timing-cache",
        metavar="FILE",
        type=Path,
        help="file with timings of kernels, reused by later builds",
    )
    kinds.add_argument(
        "--version-compatible", action="store_true", help="run on newer TensorRT of the same major version"
    )
    kinds.add_argument(
        "--hardware-compatible", action="store_true", help="run on every GPU since Ampere; not on a Jetson"
    )


def run(options: argparse.Namespace) -> int:
    """Build the engines and print a table of them."""
    from blip2edge.errors import EngineError

    require("onnx_ir", "reading graphs", EngineError)
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
            "unknown without a GPU" if engine.landed is None else counts(engine.landed),
        ]
        for name, engine in report.engines.items()
    ]
    heads = ("engine", "size", "seconds", "profiles", "precisions asked for", "precisions of layers")
    print(table(heads, rows, right=(1, 2)))
    mark = report.fingerprint
    print(f"\n{report.directory}: TensorRT {mark.tensorrt} ({mark.target}), {', '.join(mark.gpus)}")
    print("built without a GPU, not run yet" if not mark.gpu else f"built on {mark.gpu}, not run yet")
    if report.bundle is not None:
        print(f"{report.bundle}: holds engines alone, for the machine that they were built for")
    return 0


def counts(numbers: Mapping[str, int]) -> str:
    """Counts in one line, such as `12 int8, 3 fp16`."""
    return ", ".join(f"{number} {name}" for name, number in numbers.items()) or "-"
