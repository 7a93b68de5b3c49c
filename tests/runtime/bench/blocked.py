"""Runs commands in a separate process in which some packages cannot be imported."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from blip2edge.cli import main
from blip2edge.errors import BackendError

status = main({arguments!r})
assert not set({blocked!r}) & set(sys.modules), "imported although it is blocked"
sys.exit(status)
"""


def without(blocked: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process where some packages cannot be imported."""
    code = BLOCKED.format(blocked=blocked, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
