"""Checks of ``blip2edge doctor`` that matter most on a board: power mode, clocks, swap, disk.

The values come from files of the system and from the command ``nvpmodel``. A check is left out if the file that it
needs is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from blip2edge.bundle.user_cache import NoHomeError, cache_directory
from blip2edge.runtime.backends.probe import Check

LEAST_FREE = 8_000_000_000  # bytes of disk for a bundle of three billion weights in INT8, its engines and a swap file
QUERY_S = 5.0  # time limit of nvpmodel

Query = Callable[[], str]


def read_file(path: Path) -> str:
    """Reads a small system file; returns its text without surrounding spaces, empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def query_nvpmodel() -> str:
    """Returns the output of ``nvpmodel -q``; empty if ``nvpmodel`` is not installed or fails."""
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=QUERY_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


RUNNERS = {
    "CUDAExecutionProvider": "cuda",
    "openvino": "openvino",
    "CPUExecutionProvider": "cpu",
}
"""Checks of :func:`diagnose` that multiply matrices, each with the backend that it tests; the fastest first."""

UNTRIED = {"TensorRT": "tensorrt", "TensorRT-RTX": "rtx"}
"""Checks that only find a package and a driver, each with the backend; these checks do not run the backend."""


def conclusion(checks: Sequence[Check]) -> str:
    """Returns a sentence: which backends ran here, which were not tried, the free memory, and what to correct.

    Args:
        checks: All checks of the doctor.
    """
    passed = {check.name: check for check in checks if check.ok}
    backends = [backend for name, backend in RUNNERS.items() if name in passed]
    untried = [f"{backend} is installed, not tried" for name, backend in UNTRIED.items() if name in passed]
    if not backends and not untried:
        broken = next((check for check in checks if check.required and not check.ok), None)
        return "nothing runs here yet" + (f": {broken.fix}" if broken and broken.fix else "")
    memory = passed.get("memory")
    free = re.search(r"[\d.]+ GB available", memory.detail) if memory else None
    runs = f"captions run here with --backend {' or '.join(backends)}" if backends else "no backend was tried here"
    sentence = runs + (f", {free[0]}" if free else "")
    fixes = [check.fix for check in checks if check.name in BOARD and not check.ok and check.fix]
    return "; ".join([sentence, *untried, *fixes])


BOARD = ("power mode", "clocks", "swap", "disk")
"""Names of the checks of :func:`board_checks`."""


def board_checks(root: Path = Path("/"), query: Query = query_nvpmodel) -> list[Check]:
    """Checks the power mode, the clocks, the swap space and the disk.

    Args:
        root: Directory that contains ``proc``, ``sys`` and ``etc``.
        query: Returns the output of ``nvpmodel -q``.
    """
    is_jetson = (root / "etc/nv_tegra_release").exists() or "Jetson" in read_file(root / "proc/device-tree/model")
    found = (_power_mode(root, query), _clocks(root, is_jetson), _swap(root, is_jetson), _disk())
    return [check for check in found if check is not None]


def _power_mode(root: Path, query: Query) -> Check | None:
    """Checks whether the board runs in its power mode without a limit; if not, the advice is to choose that mode."""
    modes = dict(re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", read_file(root / "etc/nvpmodel.conf")))
    current = re.search(r"NV Power Mode:\s*(\S+)\s+(\d+)", query())
    number = current[2] if current else read_file(root / "var/lib/nvpmodel/status").partition(":")[2].lstrip("0") or "0"
    name = current[1] if current else modes.get(number, "")
    if not name:
        return None
    most = next((one for one, called in modes.items() if called.startswith("MAXN")), None)
    if name.startswith("MAXN") or most is None:
        return Check("power mode", True, f"{name} (mode {number})")
    detail = f"{name} (mode {number}); {modes[most]} (mode {most}) has no power limit"
    return Check("power mode", False, detail, f"sudo nvpmodel -m {most}")


def _clocks(root: Path, is_jetson: bool) -> Check | None:
    """Reports present and largest clock of CPU and GPU; fails on a Jetson whose GPU clock is not fixed."""
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    parts = []
    for policy in policies[:1]:
        now, most = (read_file(policy / name) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
        governor = read_file(policy / "scaling_governor")
        parts.append(f"CPU {_megahertz(now, 1e3)} of {_megahertz(most, 1e3)} MHz, governor {governor or 'not known'}")
    locked = True
    for gpu in sorted((root / "sys/class/devfreq").glob("*gpu*"))[:1]:
        least, now, most = (read_file(gpu / name) for name in ("min_freq", "cur_freq", "max_freq"))
        parts.append(f"GPU {_megahertz(now, 1e6)} of {_megahertz(most, 1e6)} MHz")
        locked = least == most
    if not parts:
        return None
    ok = locked or not is_jetson
    return Check("clocks", ok, "; ".join(parts), None if ok else "before measuring: sudo jetson_clocks")


def _megahertz(text: str, unit: float) -> str:
    return f"{int(text) / unit:.0f}" if text.isdigit() else "?"


def _swap(root: Path, is_jetson: bool) -> Check | None:
    """Reports the swap space on disk and in compressed memory; fails on a Jetson without swap space on disk."""
    table = read_file(root / "proc/swaps")
    if not table:
        return None
    rows = [line.split() for line in table.splitlines()[1:]]
    sizes = {row[0]: int(row[2]) * 1024 / 1e9 for row in rows if len(row) > 2 and row[2].isdigit()}
    compressed = sum(size for name, size in sizes.items() if "zram" in name)
    stored = sum(sizes.values()) - compressed
    parts = [f"{stored:.1f} GB on disk"] if stored else []
    parts += [f"{compressed:.1f} GB in compressed memory"] if compressed else []
    ok = bool(stored) or not is_jetson
    fix = "`build` needs more memory than a run: make a swap file on NVMe (docs/jetson.md)"
    return Check("swap", ok, ", ".join(parts) or "none", None if ok else fix)


def _disk() -> Check:
    """Checks the free disk space in the user's cache, which may hold engines and optimized copies."""
    try:
        cache = cache_directory()
    except NoHomeError:
        cache = Path.cwd()
    folder = next(path for path in (cache, *cache.parents) if path.is_dir())
    usage = shutil.disk_usage(folder)
    ok = usage.free >= LEAST_FREE
    detail = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free at {folder}"
    return Check("disk", ok, detail, None if ok else "make room, or set XDG_CACHE_HOME to a larger disk")
