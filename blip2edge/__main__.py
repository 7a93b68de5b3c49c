"""``python -m blip2edge`` and the console script."""

from __future__ import annotations

import sys
from typing import NoReturn

from blip2edge.cli import interrupt, main


def run() -> NoReturn:
    """Run the command line and exit with its status."""
    interrupt.install()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # escape characters that the terminal's encoding does not have
            reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    run()
