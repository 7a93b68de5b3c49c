"""Names the process and the machine that write an output, and tells whether machines share a file system."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "glusterfs", "afs", "fuse.")  # begin the type's name


def command() -> str:
    """Returns the program's name and its command; other arguments are left out, because they may contain an API key."""
    if not sys.argv or not sys.argv[0]:
        return ""
    return " ".join([Path(sys.argv[0]).name, *(word for word in sys.argv[1:2] if word.isalnum())])[:200]


def machine() -> str:
    """Returns a name of this machine; the name changes when the machine starts again.

    In a container, the name is that of the machine on which the container runs.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def on_network(path: Path) -> bool:
    """Whether a directory is on a file system that other machines share (Linux; False elsewhere)."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    kinds = (line.partition(" - ")[2] for line in lines if line.split()[2:3] == [number])
    return any(kind.startswith(NETWORK) for kind in kinds)
