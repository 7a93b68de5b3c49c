"""The command ``blip2edge build``: its flags, and the function that runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.choices import DECODER_CACHES, TENSORRT_EDITIONS
from blip2edge.cli.flag_groups import add_anyway, add_bundle, add_number, add_output
from blip2edge.cli.flag_types import positive_int
from blip2edge.cli.next_steps import print_next, try_command
from blip2edge.cli.table import size, table
from blip2edge.packages import require
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from blip2edge.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``build``."""
    add_bundle(parser)
    parser.add_argument(
        "--target",
        choices=TENSORRT_EDITIONS,
        default="tensorrt",
        help="edition of TensorRT. tensorrt: build on the machine that runs the engines; rtx (TensorRT for RTX): "
        "build on any machine",
    )
    parser.add_argument(
        "--sm",
        metavar="CC",
        type=positive_int,
        action="append",
        default=[],
        help="compute capability of the GPU that runs the engines (86 means 8.6), with --target rtx only; repeat the "
        "flag for several GPUs (default: the GPU of this machine)",
    )
    add_output(
        parser,
        "DIR",
        "write a new bundle to DIR that contains the engines and no ONNX files, for a device with little disk space "
        "(default: add the engines to BUNDLE)",
        required=False,
    )
    add_anyway(parser)
    sizes = parser.add_argument_group("sizes", "limits of the engines; lower limits need less memory")
    add_number(sizes, "--workspace", "limit of the build's scratch memory in MiB (default: no limit)", metavar="MiB")
    add_number(
        sizes,
        "--capacity",
        "capacity of the KV cache: largest number of tokens of prompt and answer together (default: the usual "
        "length of the prompt plus 256, at most the model's context)",
    )
    add_number(sizes, "--max-batch", "largest number of rows (pictures times beams) in one batch (default: 8)")
    kinds = parser.add_argument_group("kinds of engines")
    kinds.add_argument(
        "--decoder",
        choices=DECODER_CACHES,
        default="auto",
        help="KV cache of the decoder. in-place: each step writes the new tokens only (TensorRT 10.15 and newer, and "
        "rtx); constant: each step copies the cache; auto: in-place if the TensorRT version and the model allow it, "
        "otherwise constant; concatenated: the cache grows with each token, for comparisons only, because blip2edge "
        "cannot run such engines",
    )
    kinds.add_argument(
        "--timing-cache",
        metavar="FILE",
        type=Path,
        help="file of kernel timings, which makes later builds faster (default: in the directory of the engines)",
    )
    kinds.add_argument(
        "--version-compatible",
        action="store_true",
        help="build engines that also run with newer TensorRT versions of the same major version",
    )
    kinds.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="build engines that also run on other GPUs (Ampere and newer); not available on a Jetson",
    )


def run(options: argparse.Namespace) -> int:
    """Build the engines and print a table of them."""
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.manifest import MANIFEST
    from blip2edge.bundle.outputs.files import check_file
    from blip2edge.bundle.outputs.publishing import check_output
    from blip2edge.errors import EngineError

    if options.output is not None:
        check_output(options.output, options.force, MANIFEST, options.bundle)
    if options.timing_cache is not None:
        check_file(options.timing_cache, "timing_cache")
    require("onnx_ir", "reading graphs", EngineError)
    from blip2edge.engine.build import build_bundle

    with Progress() as progress:
        report = build_bundle(
            options.bundle,
            target=options.target,
            sm=options.sm,
            output=options.output,
            force=options.force,
            anyway=options.anyway,
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
    header = ("engine", "size", "seconds", "profiles", "requested precisions", "actual precisions")
    print(table(header, rows, right=(1, 2)))
    mark = report.fingerprint
    print(f"\n{report.directory}: TensorRT {mark.tensorrt} ({mark.target}), {', '.join(mark.gpus)}")
    print("built without a GPU, not run yet" if not mark.gpu else f"built on {mark.gpu}, not run yet")
    if report.bundle is not None:
        print(f"{report.bundle}: contains engines only; they run only on the kind of machine that they were built for")
    path = report.bundle or options.bundle
    command = try_command(path, Bundle.open(path).manifest, options.target)
    if mark.gpu:
        print_next(command)
    else:
        print(f"next, on a machine with a GPU of {' or '.join(mark.gpus)}: {command}")
    return 0


def counts(numbers: Mapping[str, int]) -> str:
    """Joins names and their counts in one line, such as `12 int8, 3 fp16`."""
    return ", ".join(f"{number} {name}" for name, number in numbers.items()) or "-"
