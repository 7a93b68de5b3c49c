"""Flags that several commands share."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from blip2edge.bundle.hub.names import is_downloaded
from blip2edge.bundle.schema import DRAFTS, BackendName
from blip2edge.cli.flag_types import (
    non_negative_int,
    non_negative_number,
    number,
    positive_int,
    positive_number,
    share,
    share_or_zero,
)
from blip2edge.cli.messages import print_note
from blip2edge.cli.next_steps import quoted
from blip2edge.errors import UsageError, option
from blip2edge.limits import ConnectionLimits, Limits

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _ActionsContainer
    from collections.abc import Callable, Iterable

    from blip2edge.bundle.bundle import Bundle
    from blip2edge.cli.parser import Parser

LimitsClass = TypeVar("LimitsClass", Limits, ConnectionLimits)

MAX_BROKEN = 100
BUNDLE = (
    "bundle directory, written by `blip2edge export` or `calibrate`; or hub:ORG/NAME[@REVISION], which is downloaded"
)
DATA = (
    "a COCO JSON file of captions or VQA questions, Karpathy's dataset_coco.json, a table (a JSON list, .jsonl, .csv, "
    ".tsv, an imagefolder), a folder of pictures and .txt files, tar shards, Parquet files, or a recipe (its section "
    "[data])"
)

# Field of GenerationOptions -> the flag's placeholder, type and help.
GENERATION: dict[str, tuple[str, Callable[[str], float], str]] = {
    "max_new_tokens": ("N", positive_int, "largest number of generated tokens"),
    "min_new_tokens": ("N", non_negative_int, "smallest number of generated tokens"),
    "num_beams": ("K", positive_int, "number of beams; 1: greedy decoding or sampling"),
    "length_penalty": ("X", number, "divide a beam's score by its length to the power of X; above 0: longer texts"),
    "repetition_penalty": ("X", positive_number, "above 1: lower the logits of tokens that are in the text; 1: off"),
    "temperature": ("T", non_negative_number, "sample at temperature T; 0: greedy decoding"),
    "top_p": ("P", share, "sample from the most likely tokens whose probabilities sum up to P (0 to 1)"),
    "top_k": ("K", non_negative_int, "sample from the K most likely tokens; 0: from all"),
    "seed": ("S", non_negative_int, "seed of sampling"),
    "abstain_below": (
        "P",
        share_or_zero,
        "give no text if its confidence is below P (0 to 1; 0: never); the bundle needs one: `calibrate --references`",
    ),
    "queries": (
        "M",
        positive_int,
        "number of visual tokens of each picture or frame, for elastic bundles; fewer save time and memory",
    ),
}
# Groups of generation flags: title, description, and which. Published evaluations use those of the first.
DECODING = (
    "generation",
    "default values are in bundle.json; a checkpoint has those that its bundle would have",
    ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "queries"),
)
SAMPLING = (
    "sampling",
    "BLIP samples its synthetic captions; without these options decoding is greedy",
    ("temperature", "top_p", "seed"),
)


def add_number(
    group: _ActionsContainer,
    flag: str,
    text: str,
    default: float | None = None,
    *,
    kind: Callable[[str], float] = positive_int,
    metavar: str = "N",
) -> None:
    """Adds an option with one number."""
    group.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)


def add_ray(parser: ArgumentParser, workers: str, what: str) -> None:
    """Adds ``--ray`` and the flag with the number of its workers.

    The second flag has no default, so that :func:`check_needed` can refuse it without ``--ray``.

    Args:
        parser: The parser of the command.
        workers: The flag of the number of workers.
        what: What each worker does first, such as ``load the bundle``; for the help.
    """
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run with Ray Data on the cluster at ADDRESS (HOST:PORT); auto: on the cluster that runs on this machine; "
        "local: on this machine alone (default: without Ray)",
    )
    add_number(parser, workers, f"with --ray: number of processes that {what} and run in parallel (default: 1)")


def check_needed(name: str, value: object, needed: str, given: object) -> None:
    """Raises UsageError if the option ``name`` is given without the option ``needed``.

    ``name`` has no effect without ``needed``. ``value`` and ``given`` are the values of both options; None: not given.
    """
    if value is not None and given is None:
        raise UsageError(
            f"{option(name)} needs {option(needed)}",
            f"give {option(needed)}, or leave {option(name)} out",
            field=name,
        )


def add_queries(parser: _ActionsContainer, rest: str) -> None:
    """Adds ``--queries``."""
    add_number(parser, "--queries", f"number of visual tokens of each picture {rest}", metavar="M")


def add_bundle(parser: Parser) -> None:
    """Adds the bundle, which is given as the first argument or with ``--bundle``."""
    parser.add_positional_or_flag("bundle", "-b", "--bundle", metavar="BUNDLE", type=Path, help=BUNDLE)


def add_bundle_option(parser: ArgumentParser) -> None:
    """Adds the option ``--bundle``, and the options of the backend that runs the bundle."""
    parser.add_argument("-b", "--bundle", metavar="BUNDLE", type=Path, required=True, help=BUNDLE)
    add_backend(parser)


def add_backend(parser: ArgumentParser) -> None:
    """Adds ``--backend`` and ``--threads``."""
    parser.add_argument(
        "--backend",
        choices=get_args(BackendName),
        default="auto",
        help="backend that runs the bundle; auto: engines that fit this GPU, else cuda if ONNX Runtime can use "
        "the GPU, else cpu",
    )
    add_threads(parser)
    add_require_signature(parser)


def add_require_signature(parser: ArgumentParser) -> None:
    """Adds ``--require-signature``."""
    parser.add_argument(
        "--require-signature",
        metavar="PUBLIC_KEY",
        type=Path,
        help="load the bundle only if it is signed with the private key of PUBLIC_KEY (see `blip2edge sign`), and use "
        "no file that is not signed",
    )


def print_unsigned(bundle: Bundle) -> None:
    """Prints which files of a bundle are not used because its required signature does not list them."""
    if bundle.unsigned:
        again = f", or sign the bundle again: blip2edge sign {quoted(bundle.path)} --key KEY"
        print_note(
            f"note: not used, because the signature does not list it: {', '.join(bundle.unsigned)}; "
            f"remove the files that are not yours{'' if is_downloaded(bundle.path) else again}"
        )


def add_threads(parser: ArgumentParser) -> None:
    """Adds ``--threads``, the number of CPU threads."""
    add_number(parser, "--threads", "number of CPU threads (default: all cores)")


def add_output(
    parser: ArgumentParser,
    metavar: str,
    text: str,
    *,
    required: bool = True,
    force: str = "replace {} if it exists",
) -> None:
    """Adds the flag of a command's output, and ``--force`` to replace an existing output."""
    parser.add_argument("-o", "--output", metavar=metavar, type=Path, required=required, help=text)
    parser.add_argument("--force", action="store_true", help=force.format(metavar))


def add_batch_size(parser: ArgumentParser, default: int) -> None:
    """Adds ``--batch-size``, the number of pictures in one batch."""
    add_number(parser, "--batch-size", "number of pictures in one batch", default)


def add_stream_or_json(parser: ArgumentParser) -> None:
    """Adds the flags for the way in which captions are printed: ``--stream`` or ``--json``."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--stream", action="store_true", help="print each caption while it is generated")
    how.add_argument("--json", action="store_true", help="print one line of JSON for each picture")


def add_generation(parser: ArgumentParser) -> None:
    """Adds a flag for each field of GenerationOptions, and the flags of the draft model."""
    group = add_some_generation(parser, "generation", "default values are in bundle.json", GENERATION)
    add_draft(
        group,
        "draft model of speculative decoding, which never changes the text. itg: the Q-Former's text head; lookup: "
        "prompt lookup; auto: itg if the bundle has it and decoding is greedy, else none",
    )


def add_draft(group: _ActionsContainer, text: str) -> None:
    """Adds ``--draft``, the draft model."""
    group.add_argument("--draft", choices=DRAFTS, default="auto", help=text)


def add_some_generation(
    parser: ArgumentParser, title: str, description: str, names: Iterable[str]
) -> _ActionsContainer:
    """Adds a group with those flags of :data:`GENERATION` that `names` lists; returns the group."""
    group = parser.add_argument_group(title, description)
    for name in names:
        metavar, kind, text = GENERATION[name]
        group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, type=kind, help=text)
    return group


def given_generation(options: Namespace) -> dict[str, Any]:
    """Returns the values of the generation flags that were given, by their field of GenerationOptions."""
    given = {name: getattr(options, name, None) for name in GENERATION}
    return {name: value for name, value in given.items() if value is not None}


def add_limits(parser: ArgumentParser, kind: type[Limits | ConnectionLimits], names: Iterable[str] = ()) -> None:
    """Adds a flag for each limit of the class ``kind``, or only for the limits that ``names`` lists."""
    group = parser.add_argument_group("limits" if kind is Limits else "limits of connections")
    for one in fields(kind):
        if names and one.name not in names:
            continue
        form = positive_int if isinstance(one.default, int) else positive_number
        about = one.metadata
        group.add_argument(
            about["flag"],
            dest=f"limit_{one.name}",
            metavar=about["unit"],
            type=form,
            help=f"{about['help']} (default: {one.default})",
        )


def given_limits(options: Namespace, kind: type[LimitsClass]) -> LimitsClass:
    """Returns the limits that the flags set; a limit whose flag is not given has its default."""
    given = {one.name: getattr(options, f"limit_{one.name}", None) for one in fields(kind)}
    return kind(**{name: value for name, value in given.items() if value is not None})


def add_data_files(parser: ArgumentParser) -> None:
    """Adds the flags for the files of a data set, and for the number of samples that may be missing or broken."""
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="directory of the pictures of a JSON file or a table (default: the directory of the file, or one of "
        "COCO's picture folders in it or beside it)",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="JSON file with the answers to VQA questions (default: the file beside the questions that has annotations "
        "in place of questions in its name)",
    )
    add_number(
        parser,
        "--max-broken",
        "stop with an error if more than N samples are missing or broken; up to N such "
        "samples are skipped and reported",
        MAX_BROKEN,
        kind=non_negative_int,
    )


def add_no_optimize(parser: ArgumentParser) -> None:
    """Adds ``--no-optimize``: `export` and `calibrate` then make no optimized copy at their end."""
    parser.add_argument(
        "--no-optimize",
        action="store_true",
        help="do not make a copy of the graphs that is optimized for the CPU (see `blip2edge optimize`)",
    )


def add_anyway(parser: ArgumentParser) -> None:
    """Adds ``--anyway``: the command goes on even if this machine certainly has too little memory."""
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="go on even if this machine certainly has too little memory (see `blip2edge plan`)",
    )
