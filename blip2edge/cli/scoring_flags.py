"""The flags of ``eval`` and ``capfilt``: a model, or two, on data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.flags import Parser, add_command, non_negative_int, positive_int, share
from blip2edge.cli.running_flags import add_some_generation, add_where

if TYPE_CHECKING:
    from blip2edge.cli.flags import Commands

METRICS = ("exact", "captions", "chair", "pope", "vqa", "retrieval")
KEPT = ("both", "web", "synthetic")
MAX_BROKEN = 100
# Groups of generation flags: title, what is said of them, and which. Evaluations are published with those of the first.
DECODING = (
    "generation",
    "what is not given is as the bundle says; checkpoints are greedy",
    ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty"),
)
DRAWING = (
    "drawing",
    "BLIP drew its synthetic captions; without these they are greedy",
    ("temperature", "top_p", "seed"),
)
FILES = "COCO's JSON of captions or VQA questions, a folder of pictures with .txt beside them, tar shards, or a recipe"


def add_eval(commands: Commands) -> None:
    """``blip2edge eval``."""
    parser = add_command(commands, "eval", "what a checkpoint or a bundle is worth", "evaluate", "evaluate")
    parser.add_argument("model", metavar="CHECKPOINT|BUNDLE", type=Path)
    parser.add_argument(
        "--data",
        metavar="FILE",
        default="scenes",
        help=f"scenes, generated as they are needed (the default); {FILES}",
    )
    _places(parser)
    parser.add_argument(
        "--split",
        choices=("heldout", "train"),
        default="heldout",
        help="of the scenes: object pairs that training never showed, or those that it did (heldout)",
    )
    parser.add_argument(
        "--count", metavar="N", type=positive_int, help="pictures at most (1000 scenes; of a file all)"
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=f"only these of {', '.join(METRICS)}"
    )
    parser.add_argument("--prompt", metavar="P", help="how captions begin (the model's own prompt)")
    parser.add_argument(
        "--top",
        metavar="K",
        type=non_negative_int,
        default=16,
        help="retrieval: so many of the nearest are put in order anew by the matching head; 0: none (16)",
    )
    parser.add_argument(
        "--ask",
        action="store_true",
        help="pope: put its questions to the model (without it they are answered by what the captions name)",
    )
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        type=Path,
        help="write what the model said, in COCO's format of results",
    )
    _running(parser)
    add_some_generation(parser, *DECODING)
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")


def add_capfilt(commands: Commands) -> None:
    """``blip2edge capfilt``."""
    parser = add_command(
        commands,
        "capfilt",
        "clean captions: written by a captioner, filtered by a matching head",
        "capfilt",
        "capfilt",
    )
    parser.add_argument("data", metavar="DATA", help=FILES)
    parser.add_argument(
        "--captioner",
        metavar="CHECKPOINT|BUNDLE",
        type=Path,
        required=True,
        help="what writes the synthetic captions",
    )
    parser.add_argument(
        "--matcher",
        metavar="CHECKPOINT|BUNDLE",
        type=Path,
        required=True,
        help="what judges all captions (ITM)",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="where the shards and report.json go"
    )
    parser.add_argument(
        "--threshold",
        metavar="P",
        type=share,
        default=0.5,
        help="least probability of a caption that is kept (0.5)",
    )
    parser.add_argument(
        "--keep", choices=KEPT, default="both", help="which captions are kept if they are good enough (both)"
    )
    _places(parser)
    parser.add_argument("--prompt", metavar="P", help="how captions begin (the captioner's own prompt)")
    parser.add_argument(
        "--samples-per-shard", metavar="N", type=positive_int, default=1000, help="pictures a shard (1000)"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="spread the work with Ray Data over the cluster at ADDRESS; local: over this machine",
    )
    parser.add_argument(
        "--workers", metavar="N", type=positive_int, default=1, help="with --ray: models at work at once (1)"
    )
    _running(parser)
    add_some_generation(parser, *DECODING)
    add_some_generation(parser, *DRAWING)
    parser.add_argument("--force", action="store_true", help="replace DIR if it is of this command")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def _places(parser: Parser) -> None:
    """Where the parts of COCO's files are."""
    parser.add_argument("--images", metavar="DIR", help="of a JSON file: its pictures (beside it)")
    parser.add_argument("--annotations", metavar="FILE", help="of VQA's questions: the answers (beside them)")
    parser.add_argument(
        "--max-broken",
        metavar="N",
        type=non_negative_int,
        default=MAX_BROKEN,
        help=f"samples that may be missing or broken; they are counted and named ({MAX_BROKEN})",
    )


def _running(parser: Parser) -> None:
    parser.add_argument("--batch-size", metavar="N", type=positive_int, default=16, help="at once (16)")
    add_where(parser)
