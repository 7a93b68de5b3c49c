"""``python -m blip2edge`` and the console script."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from blip2edge.cli import main

if TYPE_CHECKING:
    from types import FrameType

TERMINATED = 128 + signal.SIGTERM


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """On SIGTERM leave by an exception, so that half-written directories are removed on the way out."""
    raise SystemExit(TERMINATED)


def run() -> NoReturn:
    """Run the command line and leave with its exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a caption or a file name that the terminal's encoding lacks is escaped
            reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    run()
