"""Writes the tables of docs/plan.md: the boards, the assumed efficiency, and predictions against measurements.

python benchmarks/plan_page.py --write docs/plan.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from reporting import RESULTS, parser_of, with_tables

from blip2edge.cli import run_script
from blip2edge.runtime.bench.devices import CPU_EFFICIENCY, DEVICES, GPU_EFFICIENCY
from blip2edge.runtime.bench.plan import PlanOptions, device_plan
from blip2edge.shapes.sources import find_shape

MODEL = "Salesforce/blip2-opt-2.7b"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; all columns except the first and the column "source" are aligned to the right."""
    rule = ["---" if name in ("", head[0], "source") else "---:" for name in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)) + "\n"


def tera(rate: float | None) -> str:
    """Returns a rate as text, in tera-operations per second; a dash if the board has no arithmetic for the format."""
    return "–" if rate is None else f"{rate / 1e12:.3g}"


def boards() -> str:
    """Returns the table of the boards, with memory and times of BLIP-2 with OPT-2.7b on each board."""
    shape, _ = find_shape(MODEL)
    rows = []
    for name, board in DEVICES.items():
        plan = device_plan(shape, board, PlanOptions())
        row = plan.of(plan.chosen)
        fits = row.precision if row.fits else "none"
        rows.append(
            (
                f"`{name}`",
                f"{board.memory / 2**30:.0f} GiB",
                f"{board.bytes_per_s / 1e9:.0f}",
                " / ".join(tera(board.rates.get(kind)) for kind in ("fp32", "fp16", "int8")),
                fits,
                f"{row.ms['total']:,.0f}" if row.fits else "–",
                f"{row.tokens_per_s:.0f}" if row.fits else "–",
                board.source,
            )
        )
    head = ("board", "memory", "GB/s", "fp32 / fp16 / int8, T/s", "fits", "caption, ms", "tokens/s", "source")
    return markdown(head, rows)


def efficiency() -> str:
    """Returns the table of the assumed efficiency: which share of a board's peak rates a model reaches."""
    rows = [
        (kind, *(f"{share:.0%}" for table in (CPU_EFFICIENCY, GPU_EFFICIENCY) for share in (table.products[kind],
                                                                                            table.bytes[kind])))
        for kind in CPU_EFFICIENCY.products
    ]  # fmt: skip
    head = ("weights", "CPU: products", "CPU: bytes", "GPU: products", "GPU: bytes")
    return f"{markdown(head, rows)}\nCPU: {CPU_EFFICIENCY.source}.\nGPU: {GPU_EFFICIENCY.source}.\n"


def compared(file: str) -> str:
    """Returns the table of predicted and measured times, from the result file of ``plan_check.py``."""
    found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = []
    for result in found["results"]:
        title = f"{result['name']} {result.get('precision', 'fp32')}"
        for stage, row in result["stages"].items():
            rows.append(
                (f"{title}, {stage}", f"{row['predicted_ms']:,.2f}", f"{row['measured_cpu_ms']:,.2f}",
                 f"{row['ratio']:.2f}")
            )  # fmt: skip
        memory = result["memory"]
        values = [memory["predicted_without_workspace"], memory["measured_growth"]]
        rows.append((f"{title}, memory (MB)", *(f"{value / 1e6:,.0f}" for value in values),
                     f"{values[0] / values[1]:.2f}"))  # fmt: skip
    text = markdown(("", "predicted, ms", "measured, CPU ms", "ratio"), rows)
    within = f"{found['stages_within']} of {found['stages']} stages within {found['within']:.0%}"
    return f"{text}\n{within}. {found['machine']['cpu']}, one thread.\n"


TABLES: dict[str, Callable[[], str]] = {
    "boards": boards,
    "efficiency": efficiency,
    "check": partial(compared, "plan.json"),
    "independent": partial(compared, "plan-independent.json"),
}


def placed(page: str) -> str:
    """Returns the page with the current tables between their marks."""
    return with_tables(page, TABLES, "plan_page.py")


def main() -> None:
    """Writes the tables into docs/plan.md."""
    parser = parser_of(__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", required=True, help="write the tables into the page FILE")
    path: Path = parser.parse_args().write
    path.write_text(placed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
