"""What this machine computes on: its processor and the cores of it that are ours."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

NAMES = ("model name", "Model")
"""Whose value is the processor's name, or on Arm the board's."""

NUMBERS = (
    *("cpu family", "model", "stepping"),
    *("CPU implementer", "CPU variant", "CPU part", "CPU revision"),
)
"""What tells generations apart that go by one name: as x86 says it, then Arm."""


def cores() -> int:
    """The cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system: all there are
        return os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as a person reads it."""
    return _named(facts())


def exact_processor() -> str:
    """The same with the numbers of its generation: virtual machines call several of them ``AMD EPYC``."""
    told = facts()
    numbers = ", ".join(
        f"{key.removeprefix('cpu ').removeprefix('CPU ')} {told[key]}" for key in NUMBERS if key in told
    )
    return f"{_named(told)} ({numbers})" if numbers else _named(told)


def facts() -> dict[str, str]:
    """What the system tells of its first core, by its own names; nothing where it tells nothing."""
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        told.setdefault(key, value)
    return told


def _named(told: dict[str, str]) -> str:
    names = (told[key] for key in NAMES if told.get(key))
    return next(names, platform.processor() or platform.machine())
