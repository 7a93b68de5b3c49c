"""The command ``blip2edge triton``: its flags, and the function that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from blip2edge.bundle.schema import BackendName
from blip2edge.cli.flag_groups import add_bundle, add_number, add_output, add_threads
from blip2edge.cli.flag_types import non_negative_int
from blip2edge.cli.next_steps import print_next, quoted

if TYPE_CHECKING:
    import argparse

    from blip2edge.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``triton``."""
    add_bundle(parser)
    add_output(
        parser,
        "REPOSITORY",
        "directory of the model repository; other models in it stay",
        force="replace the model if {} has one of its name",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the model (default: that of the bundle's directory)")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="make a decoupled model, which sends each piece of the text as it is generated",
    )
    parser.add_argument("--link", action="store_true", help="link the bundle instead of copying it")
    parser.add_argument("--backend", choices=get_args(BackendName), default="auto", help="backend that runs the bundle")
    add_threads(parser)
    add_number(parser, "--instances", "number of processes, each of which loads the bundle", 1)
    add_number(parser, "--max-batch", "largest number of captions decoded in one batch", 8)
    add_number(
        parser,
        "--max-delay",
        "time for which Triton waits for further requests of a batch",
        2000,
        kind=non_negative_int,
        metavar="MICROSECONDS",
    )


def run(options: argparse.Namespace) -> int:
    """Write the model and print its directory."""
    from blip2edge.bundle.hub.download import find_bundle
    from blip2edge.runtime.serving.triton.repository import TritonModel, write_model

    repository: Path = options.output
    model = TritonModel(
        name=options.name or "",
        max_batch=options.max_batch,
        delay_us=options.max_delay,
        instances=options.instances,
        threads=options.threads,
        backend=options.backend,
        stream=options.stream,
        link=options.link,
    )
    print(write_model(find_bundle(options.bundle), repository, model, force=options.force))
    print_next(f"tritonserver --model-repository {quoted(repository.resolve())}")
    return 0
