"""The command ``blip2edge certify``: its flags, and the function that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.bundle.outputs.files import check_file, write_output
from blip2edge.cli.flag_groups import add_backend, add_bundle
from blip2edge.cli.flag_types import number
from blip2edge.cli.table import table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.cli.parser import Parser
    from blip2edge.runtime.bench.certificate.certify import Certificate

HEADER = ("graph", "outputs", "largest deviation", "of", "tolerance", "first beyond")


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``certify``."""
    add_bundle(parser)
    add_backend(parser)
    parser.add_argument(
        "--min-equal",
        metavar="SHARE",
        type=number,
        help="smallest share of the captions' tokens that must be equal (default: 1 for a bundle in fp32, else 0.9)",
    )
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=number,
        help="largest allowed deviation of an output from the recorded one, |output - recorded| / |recorded| (default: "
        "0.001 in fp32, 0.03 in fp16, 0.1 in bf16, 0.15 with integers)",
    )
    parser.add_argument("--json", action="store_true", help="print the certificate as one JSON object")
    parser.add_argument("--output", metavar="FILE", type=Path, help="also write the certificate to FILE, as JSON")


def run(options: argparse.Namespace) -> int:
    """Run a bundle's graphs and captions here, and compare them with its references.

    Returns the exit status: 1 if an output exceeds its tolerance, or if too few tokens are equal.
    """
    if options.output is not None:
        check_file(options.output, "output")
    from blip2edge.runtime.bench.certificate.certify import certify

    with Progress() as progress:
        found = certify(
            options.bundle,
            backend=options.backend,
            threads=options.threads,
            min_equal=options.min_equal,
            tolerance=options.tolerance,
            require_signature=options.require_signature,
            progress=progress,
        )
    document = json.dumps(found.to_json(), indent=2)
    print(document if options.json else certificate_text(found), flush=True)
    if options.output is not None:
        write_output(options.output, f"{document}\n", "output")
    return 1 if found.faults else 0


def certificate_text(found: Certificate) -> str:
    """Formats the certificate: a table of the graphs, then lines with tokens, times, and the failed checks."""
    rows = [
        [
            one.graph,
            str(len(one.outputs)),
            f"{one.worst.deviation:.1e}",
            one.worst.output,
            f"{one.worst.tolerance:g}",
            one.first_beyond or "-",
        ]
        for one in found.graphs
    ]
    lines = [table(HEADER, rows, right=(1, 2, 4))]
    if found.tokens[1]:
        captions, tokens = found.captions, found.tokens
        lines.append(f"\n{captions[0]} of {captions[1]} captions and {tokens[0]} of {tokens[1]} tokens are equal")
        lines.append("  ".join(f"{stage} {ms:.1f} ms" for stage, ms in found.timings_ms.items()))
    lines.append("")
    lines += [f"fault: {fault}" for fault in found.faults]
    if not found.faults:
        machine = found.machine["processor"]
        lines.append(
            f"certified: {found.bundle} gives the reference outputs with the backend {found.backend} on {machine}"
        )
    return "\n".join(lines)
