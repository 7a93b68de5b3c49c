"""``blip2edge doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.cli.demo import DEMO_PACKAGES
from blip2edge.cli.next_steps import print_next
from blip2edge.packages import install_command, missing

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no flags: ``doctor`` has none."""


def run(_options: argparse.Namespace) -> int:
    """Print what this machine can run; status 1 where it cannot caption at all."""
    from blip2edge.runtime.bench.doctor import diagnose

    checks = diagnose()
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok" if check.ok else ("FAIL" if check.required else "no")
        print(f"{mark:4}  {check.name.ljust(width)}  {check.detail}")
        if check.fix is not None and not check.ok:
            print(f"      {' ' * width}  -> {check.fix}")
    absent = missing(DEMO_PACKAGES)
    print_next(install_command("demo").partition(": ")[2] if absent else "blip2edge demo")
    return 1 if any(check.required and not check.ok for check in checks) else 0
