"""The flags of every command, and nothing else: `--help` must not wait for numpy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge import __version__
from blip2edge.cli.engine_flags import add_build
from blip2edge.cli.flags import (
    Parser,
    add_command,
    non_negative_int,
    positive_int,
)
from blip2edge.cli.live_flags import add_bench, add_serve, add_watch
from blip2edge.cli.running_flags import add_bundle, add_generation
from blip2edge.cli.scoring_flags import add_capfilt, add_eval

if TYPE_CHECKING:
    from blip2edge.cli.flags import Commands

PRECISIONS = ("fp32", "fp16", "bf16")
COPIES = ("cpu", "cuda", "openvino")
METHODS = ("entropy", "minmax", "percentile", "mse", "smooth")
WEIGHTS = ("int8", "int4")


def build_parser() -> Parser:
    """The whole command line. Every parsed result has `run`, the command's function."""
    parser = Parser(
        prog="blip2edge",
        description="From a trained BLIP-2-style captioner to captions on an edge device.",
        epilog="exit status: 0 done, 1 an error (told in one line), 2 wrong usage",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"blip2edge {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=Parser
    )
    for add in (
        _export,
        _calibrate,
        _optimize,
        _caption,
        _ask,
        _match,
        _embed,
        add_watch,
        add_serve,
        _inspect,
        add_build,
        add_bench,
        _doctor,
        _demo,
        _train,
        add_eval,
        add_capfilt,
    ):
        add(commands)
    return parser


def _export(commands: Commands) -> None:
    parser = add_command(commands, "export", "a checkpoint to a verified ONNX bundle", "export", "export")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a local directory, a hub name or a .pth of LAVIS"
    )
    parser.add_argument(
        "-o", "--output", metavar="BUNDLE", type=Path, required=True, help="directory to write"
    )
    parser.add_argument(
        "--base", metavar="DIRECTORY", help="the checkpoint that gives a .pth of LAVIS its frozen parts"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the weights (fp32)")
    parser.add_argument(
        "--verify",
        choices=("full", "sample"),
        help="compare all of it with torch, or a stated sample of layers and shapes (default: by its size)",
    )
    parser.add_argument(
        "--merge-tokens",
        metavar="R",
        type=non_negative_int,
        default=0,
        help="merge R patches in each layer of the vision encoder: faster, and no longer transformers' answer (0)",
    )
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it exists")
    _no_optimize(parser)


def _calibrate(commands: Commands) -> None:
    parser = add_command(commands, "calibrate", "an INT8 bundle, by pictures", "calibrate", "calibrate")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="in fp32 or fp16")
    parser.add_argument(
        "-o", "--output", metavar="BUNDLE8", type=Path, required=True, help="directory to write"
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=Path,
        required=True,
        help="a folder of pictures, or of .tar shards, like those that the device will see",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="smooth", help="how the ranges are chosen (smooth)"
    )
    parser.add_argument(
        "--weights",
        choices=(*WEIGHTS, "none"),
        default="int8",
        help="what the language model's weights become, in blocks (int8; int4 is what TensorRT takes)",
    )
    parser.add_argument(
        "--drop-limit",
        metavar="X",
        type=float,
        help="leave the most sensitive layers as they are, until at most X percent points of the captions change;"
        " of CIDEr, where a .txt of references lies beside every picture",
    )
    parser.add_argument(
        "--int8-activations",
        metavar="GRAPH",
        action="append",
        default=[],
        help="a graph beside vision_encoder and bridge whose activations become INT8 too; may be repeated",
    )
    parser.add_argument(
        "--count", metavar="N", type=positive_int, default=512, help="pictures to use at most (512)"
    )
    parser.add_argument("--threads", metavar="N", type=positive_int, help="CPU threads (all cores)")
    parser.add_argument("--force", action="store_true", help="replace BUNDLE8 if it exists")
    _no_optimize(parser)


def _no_optimize(parser: Parser) -> None:
    parser.add_argument(
        "--no-optimize",
        action="store_true",
        help="make no faster copy for the CPU (see `blip2edge optimize`)",
    )


def _optimize(commands: Commands) -> None:
    parser = add_command(
        commands, "optimize", "a faster copy of a bundle for one backend", "optimize", "optimize"
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument(
        "--backend",
        choices=COPIES,
        default="cpu",
        help="what it is for (cpu); best made on the machine that runs it",
    )


def _output(parser: Parser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--stream", action="store_true", help="write the words as they come")
    how.add_argument("--json", action="store_true", help="one JSON object a line and picture")


def _caption(commands: Commands) -> None:
    parser = add_command(commands, "caption", "pictures to captions", "caption", "caption")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="a picture; for video models a video or a folder of frames"
    )
    parser.add_argument(
        "--prompt",
        metavar="P",
        action="append",
        help="how the caption begins: one for all pictures, or one each; with <image> in it (models that read "
        "several pictures), it takes that many of them",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=positive_int, default=1, help="pictures at once (1)"
    )
    add_bundle(parser)
    _output(parser)
    add_generation(parser)


def _ask(commands: Commands) -> None:
    parser = add_command(commands, "ask", "a question about a picture", "caption", "ask")
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("question", metavar="QUESTION")
    add_bundle(parser)
    _output(parser)
    add_generation(parser)


def _match(commands: Commands) -> None:
    parser = add_command(commands, "match", "how well pictures and texts go together", "match", "match")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a picture file")
    parser.add_argument(
        "--text", metavar="T", action="append", required=True, help="what they may show; repeat for more"
    )
    _pictures_at_once(parser)
    add_bundle(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, picture and text")


def _embed(commands: Commands) -> None:
    parser = add_command(commands, "embed", "the vectors of pictures or of texts", "match", "embed")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="a picture file")
    parser.add_argument(
        "--text", metavar="T", action="append", help="a text in place of pictures; repeat for more"
    )
    _pictures_at_once(parser)
    add_bundle(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object a line (the default)")
    how.add_argument("--output", metavar="FILE", type=Path, help="write one array to FILE, as .npy")


def _pictures_at_once(parser: Parser) -> None:
    parser.add_argument(
        "--batch-size", metavar="N", type=positive_int, default=1, help="pictures at once (1)"
    )


def _inspect(commands: Commands) -> None:
    parser = add_command(commands, "inspect", "what is inside a bundle", "inspect", "inspect")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--verify", action="store_true", help="hash every file again")


def _doctor(commands: Commands) -> None:
    add_command(commands, "doctor", "what this machine can really run", "doctor", "doctor")


def _demo(commands: Commands) -> None:
    parser = add_command(commands, "demo", "the whole way on the checkpoint that ships", "demo", "demo")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="keep the bundle in DIR (default: the user's cache directory)"
    )


def _train(commands: Commands) -> None:
    parser = add_command(commands, "train", "train the bridge on a frozen language model", "train", "train")
    parser.add_argument(
        "stage",
        choices=("stage1", "stage2", "instruct"),
        help="stage1: the Q-Former learns from pictures and texts; stage2: the bridge learns to speak to the language"
        " model; instruct: the same with the prompt in the Q-Former",
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", type=Path, required=True, help="the recipe, TOML or JSON"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        help="where the checkpoint is written (runs/ and the name of FILE)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last snapshot even if FILE has changed (an unchanged one goes on by itself)",
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists, and begin anew")
