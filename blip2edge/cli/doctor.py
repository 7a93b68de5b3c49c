"""The command ``blip2edge doctor``: its flags, and the function that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.cli.demo import demo_problem
from blip2edge.cli.next_steps import print_next

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no flags: ``doctor`` has none."""


def run(_options: argparse.Namespace) -> int:
    """Print what this machine can run; the exit status is 1 if it cannot caption at all."""
    from blip2edge.runtime.bench.board import conclusion
    from blip2edge.runtime.bench.doctor import diagnose

    checks = diagnose()
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok" if check.ok else ("FAIL" if check.required else "no")
        print(f"{mark:4}  {check.name.ljust(width)}  {check.detail}")
        if check.fix is not None and not check.ok:
            print(f"      {' ' * width}  -> {check.fix}")
    print(f"\n{conclusion(checks)}")
    if any(check.required and not check.ok for check in checks):
        return 1
    print_next("blip2edge caption IMAGE -b BUNDLE" if demo_problem() else "blip2edge demo")
    return 0
