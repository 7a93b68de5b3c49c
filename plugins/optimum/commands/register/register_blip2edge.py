"""Registers ``optimum-cli export blip2edge``; optimum loads every module of the namespace of this folder.

There is no ``__init__.py`` in these folders: they are parts of optimum's namespace packages (PEP 420).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

if TYPE_CHECKING:
    from argparse import ArgumentParser


class Blip2EdgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types where it is absent
    """``blip2edge export`` as a subcommand of optimum; flags, output and exit status are the same."""

    COMMAND = CommandInfo(
        name="blip2edge", help="Export a BLIP-2-style captioner to a verified ONNX bundle (blip2edge)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds the flags of ``blip2edge export``."""
        from blip2edge.cli.export import add_arguments

        add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def run(self) -> None:
        """Exports the checkpoint, and ends the process with the exit status."""
        from blip2edge.cli import guarded
        from blip2edge.cli.export import run

        sys.exit(guarded(lambda: run(self.args), debug=self.args.debug))


REGISTER_COMMANDS = [(Blip2EdgeExportCommand, ExportCommand)]
