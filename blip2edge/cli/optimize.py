"""``blip2edge optimize``: makes optimized copies of the graphs, as ``export`` and ``calibrate`` do at their end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.choices import COPIED_BACKENDS
from blip2edge.cli.flag_groups import add_bundle
from blip2edge.cli.next_steps import print_next, quoted
from blip2edge.cli.table import table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.cli.parser import Parser
    from blip2edge.optimization.pipeline import OptimizedReport

HEADER = ("graph", "portable ms", "optimized ms", "speedup", "cosine", "passes")


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``optimize``."""
    add_bundle(parser)
    parser.add_argument(
        "--backend",
        choices=COPIED_BACKENDS,
        default="cpu",
        help="backend that the copy of the graphs is optimized for; run this command on the machine "
        "that runs the bundle; cuda-decoder: CUDA kernels for the decoder, compiled for every kind of GPU; compiling "
        "needs no GPU",
    )


def run(options: argparse.Namespace) -> int:
    """Make a bundle's optimized copy for a backend and print a table of its graphs."""
    print(report_table(optimized(options.bundle, options.backend)))
    backend = "" if options.backend == "cpu" else f" --backend {options.backend}"
    print_next(f"blip2edge bench {quoted(options.bundle)}{backend}")
    return 0


def optimized(bundle: Path, backend: str = "cpu") -> OptimizedReport:
    """Makes the optimized copy of a bundle, with progress on standard error."""
    from blip2edge.optimization.pipeline import optimize

    with Progress() as progress:
        return optimize(bundle, backend, progress=progress)


def report_table(report: OptimizedReport) -> str:
    """Makes a table with a line for each optimized graph; below it, why each of the other graphs was not optimized."""
    from blip2edge.optimization.cuda_kernels.compiled import DIFFERENT, ROUNDED
    from blip2edge.optimization.recipes import NOT_INT8

    rows = []
    for name, graph in report.record.graphs.items():
        before, after = graph.milliseconds or (0.0, 0.0)
        times = f"{before / after:.2f}" if after else ""
        measured = [f"{before:.1f}", f"{after:.1f}", times] if graph.milliseconds else ["-", "-", "-"]
        cosine = "-" if graph.cosine is None else f"{graph.cosine:.5f}"
        rows.append([name, *measured, cosine, ", ".join(graph.passes)])
    graphs = report.record.graphs
    lines = [table(HEADER, rows, right=range(1, 5))] if rows else []
    compiled = any(graph.cosine is None for graph in graphs.values())
    if compiled:
        targets = ", ".join(sorted(Path(name).stem for name in report.record.files if name.endswith(".cubin")))
        lines.append(f"the kernels are compiled for {targets}")
        if any(DIFFERENT in graph.passes for graph in graphs.values()):
            lines.append(
                "warning: on this GPU the kernels chose other tokens than the CUDA provider, so `auto` does not choose "
                "them; compare their outputs: blip2edge certify BUNDLE --backend cuda-decoder"
            )
        elif all(graph.milliseconds is None for graph in graphs.values()):
            lines.append("neither run nor measured: no GPU here runs the kernels and the CUDA provider")
    elif any(graph.milliseconds is None for graph in graphs.values()):
        lines.append("speed not measured: the copy is made by rule, without a GPU")
    if any(ROUNDED in graph.passes for graph in graphs.values()):
        lines.append("the kernels round the weights of this bundle from FP32 to FP16")
    rounded = [name for name, graph in graphs.items() if NOT_INT8 in graph.passes]
    if rounded:
        lines.append(f"FP16 in place of W8A8, for which the CUDA provider has no fused kernel: {', '.join(rounded)}")
    lines += [f"{name} is not optimized: {why}" for name, why in report.record.left.items()]
    check = "compiled" if compiled else "checked against the bundle's own graphs"
    lines.append(f"{report.directory}: {check}, {report.seconds:.1f} s")
    return "\n".join(lines)
