"""``blip2edge build``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.cli.table import size, table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse


def build(options: argparse.Namespace) -> int:
    """Build the engines and print what they are for."""
    from blip2edge.engine.build import build_bundle

    with Progress() as progress:
        report = build_bundle(
            options.bundle,
            target=options.target,
            sm=options.sm,
            workspace=options.workspace,
            progress=progress,
        )
    rows = [
        [name, size(engine.size), f"{engine.seconds:.1f}", ", ".join(engine.profiles)]
        for name, engine in report.engines.items()
    ]
    print(table(("engine", "size", "seconds", "profiles"), rows, right=(1, 2)))
    mark = report.fingerprint
    print(f"\n{report.directory}: TensorRT {mark.tensorrt} ({mark.target}), {', '.join(mark.gpus)}")
    print("built, not run: no GPU took part" if not mark.gpu else f"built on {mark.gpu}")
    return 0
