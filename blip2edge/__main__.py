"""The entry point of ``python -m blip2edge`` and of the command ``blip2edge``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from blip2edge.cli import interrupt, main
from blip2edge.cli.messages import print_note, show_warnings


def run() -> NoReturn:
    """Run the command line and exit with its status."""
    _use_utf8()
    interrupt.install()
    _open_standard_streams()
    show_warnings()
    if sys.stdout is None:
        print_note("error: standard output is closed; redirect it to a file or to /dev/null")
        sys.exit(1)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # escape characters that the terminal's encoding does not have
            reconfigure(errors="backslashreplace")
    sys.exit(main())


def _use_utf8() -> None:
    """Starts this command again in Python's UTF-8 mode if the locale has another encoding, such as ``LC_ALL=C``.

    Libraries expect paths and texts as UTF-8, and fail on texts that Python decoded with another encoding.
    """
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8") and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def _open_standard_streams() -> None:
    """Opens each closed standard stream (stdin, stdout, stderr) as ``/dev/null``.

    Otherwise the next opened file would get the number of the closed stream, and a library that prints would write
    into this file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends


if __name__ == "__main__":
    run()
