"""The command line: parses the arguments, runs one command, turns every failure into one line and an exit status.

Each command is a module of this package with the command's name: `add_arguments` adds its flags, `run` runs it.
Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 any error, 2 wrong
usage, 130 or 143 ended by SIGINT or SIGTERM, 141 when the program that reads the output has ended.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

from blip2edge.cli import interrupt
from blip2edge.cli.messages import print_error, print_note
from blip2edge.cli.parser import build_parser
from blip2edge.errors import Blip2EdgeError
from blip2edge.progress import Progress, showing_transfers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INTERRUPTED = 130  # 128 + SIGINT, where no handler of ours was installed
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; by default those of this process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        options = build_parser(words).parse_args(words)
        with showing_transfers(Progress):
            status: int = options.run(options)
        return status

    return guarded(run, debug="--debug" in words)


def guarded(run: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command, and turn every failure into one line and an exit status.

    Args:
        run: The command; returns its exit status.
        debug: Whether the traceback of an error is shown as well.

    Returns:
        The exit status.
    """
    try:
        status = run()
        sys.stdout.flush()
        return status
    except SystemExit as request:  # argparse: --help, --version, wrong usage
        return request.code if isinstance(request.code, int) else 1
    except (KeyboardInterrupt, interrupt.Interrupted):
        print_note("interrupted")
        return interrupt.exit_status() or INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - every other failure becomes one line
        if debug:
            traceback.print_exc()
        signalled = interrupt.exit_status()
        if signalled is not None:  # an extension swallowed the signal's exception and raised this one
            print_note("interrupted")
            return signalled
        print_error(error)
        return error.exit_status if isinstance(error, Blip2EdgeError) else 1


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run the ``main`` of a script of this repository, and end the process with its exit status.

    An error that a user can cause, such as a missing file, becomes one line as in a command. All other exceptions keep
    their traceback: they are mistakes of the script.
    """
    import subprocess  # here, because no command needs it

    try:
        status = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        status = BROKEN_PIPE
    except (Blip2EdgeError, OSError) as error:
        print_error(error)
        status = error.exit_status if isinstance(error, Blip2EdgeError) else 1
    except subprocess.CalledProcessError as error:
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        print_note(f"error: {program} ended with exit status {error.returncode}; its own message is above")
        status = 1
    sys.exit(status)


def _discard_stdout() -> None:
    """Send standard output to os.devnull, so that Python's flush at exit raises no error."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # a test's stream has none
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)
