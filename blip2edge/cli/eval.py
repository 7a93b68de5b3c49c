"""The command ``blip2edge eval``: its flags, and the function that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2edge.bundle.outputs.files import check_file, write_output
from blip2edge.choices import METRICS, RANKINGS, SPLITS
from blip2edge.cli.flag_groups import (
    DATA,
    DECODING,
    add_backend,
    add_batch_size,
    add_data_files,
    add_number,
    add_some_generation,
    given_generation,
)
from blip2edge.cli.flag_types import any_text, metric, non_negative_int
from blip2edge.cli.next_steps import print_next, quoted
from blip2edge.cli.table import table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from blip2edge.cli.parser import Parser

_TEXTS = ("wrong", "broken_named")  # figures that are lists of texts


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``eval``."""
    parser.add_positional_or_flag(
        "model",
        "-b",
        "--bundle",
        metavar="CHECKPOINT|BUNDLE",
        type=Path,
        help="directory of the model to score; or hub:ORG/NAME[@REVISION], a bundle on the hub",
    )
    parser.add_argument(
        "--data", metavar="DATA", default="scenes", help=f"data set: the word scenes for generated pictures, or {DATA}"
    )
    add_data_files(parser)
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="heldout",
        help="pictures of --data scenes. heldout: pictures with pairs of objects that no training picture has; train: "
        "pictures with the other pairs",
    )
    add_number(parser, "--count", "largest number of pictures (default: 1000 scenes, or all pictures of a data set)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        type=metric,
        choices=METRICS,
        metavar="METRIC",
        help=f"one or more metrics to compute: {', '.join(METRICS)} (default: all that fit the model and the data)",
    )
    parser.add_argument(
        "--prompt", metavar="P", type=any_text, help="text that the captions continue (default: the model's own prompt)"
    )
    _add_retrieval_flags(parser)
    parser.add_argument(
        "--ask",
        action="store_true",
        help="with the metric pope: ask the model POPE's questions (default: derive the answers from the objects that "
        "the model's captions name)",
    )
    _add_judges(parser)
    _add_shots(parser)
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        type=Path,
        help="write the generated texts to FILE in COCO's result format; only with a captioner and a data set from "
        "files",
    )
    add_batch_size(parser, 16)
    add_backend(parser)
    add_some_generation(parser, *DECODING)
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")


def _add_shots(parser: Parser) -> None:
    """Add the flags of few-shot examples."""
    add_number(
        parser,
        "--shots",
        "examples before each caption or question, with their pictures; for a model that reads several pictures in one "
        "text",
        0,
        kind=non_negative_int,
        metavar="K",
    )
    parser.add_argument(
        "--shots-from",
        metavar="DATA",
        help="data set that the few-shot examples are drawn from, such as the training data (default: the other "
        "pictures of --data)",
    )


def _add_judges(parser: Parser) -> None:
    """Add the flags of models that judge the captions."""
    parser.add_argument(
        "--clip",
        metavar="MODEL",
        type=Path,
        help="bundle or checkpoint of CLIP, or of another model that compares pictures with texts, to compute the "
        "CLIPScore of the captions; this score needs no reference captions, so --data may be a folder of pictures only",
    )
    parser.add_argument(
        "--reader",
        metavar="MODEL",
        type=Path,
        help="for a data set with questions: let the language model of this bundle or checkpoint answer them from the "
        "captions alone",
    )
    parser.add_argument(
        "--reader-prompt",
        metavar="P",
        help="prompt of the model of --reader, with {caption} and {question} (default: "
        "'Picture: {caption}\\nQuestion: {question}\\nShort answer:')",
    )


def _add_retrieval_flags(parser: Parser) -> None:
    """Add the flags of image-text retrieval."""
    add_number(
        parser,
        "--top",
        "retrieval: number of nearest candidates that the matching head ranks again; 0: none (default: 16, or 128 with "
        "--ranking lavis)",
        kind=non_negative_int,
        metavar="K",
    )
    parser.add_argument(
        "--ranking",
        choices=RANKINGS,
        default="probability",
        help="score by which the matching head ranks candidates in retrieval; probability: the match probability; "
        "lavis: the match logit plus the cosine, as in BLIP-2's published results",
    )


def run(options: argparse.Namespace) -> int:
    """Score a checkpoint or a bundle on scenes or on data from files, and print the scores."""
    if options.predictions is not None:
        check_file(options.predictions, "predictions")
    from blip2edge.bundle.hub.names import is_hub_name
    from blip2edge.bundle.manifest import MANIFEST
    from blip2edge.training.evaluation.pipeline import evaluate

    with Progress() as progress:
        figures = evaluate(
            options.model,
            data=options.data,
            images=options.images,
            annotations=options.annotations,
            max_broken=options.max_broken,
            split=options.split,
            count=options.count,
            metrics=options.metrics or (),
            prompt=options.prompt,
            top=options.top,
            ranking=options.ranking,
            ask=options.ask,
            clip=options.clip,
            reader=options.reader,
            reader_prompt=options.reader_prompt,
            shots=options.shots,
            shots_from=options.shots_from,
            predictions=options.predictions is not None,
            backend=options.backend,
            threads=options.threads,
            batch_size=options.batch_size,
            require_signature=options.require_signature,
            progress=progress,
            **given_generation(options),
        )
    predictions = figures.pop("predictions", None)
    print(json.dumps(figures) if options.json else text_of(figures), flush=True)
    if options.predictions is not None:
        write_output(options.predictions, json.dumps(predictions) + "\n", "predictions")
    if not options.json:
        path = quoted(options.model)
        is_bundle = is_hub_name(options.model) or (options.model / MANIFEST).is_file()
        print_next(f"blip2edge bench {path}" if is_bundle else f"blip2edge export {path} -o BUNDLE")
    return 0


def text_of(figures: Mapping[str, Any]) -> str:
    """Formats the scores: a line or a table for each, then the first wrong captions and broken samples."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict) and name not in _TEXTS:
            lines.append(_table_of(name, value))
        elif name not in _TEXTS:
            lines.append(f"{name:<16}{_figure(value)}")
    for right, said in figures.get("wrong", ()):
        lines += [f"  wrong: {said.strip()!r}", f"  right: {right!r}"]
    for name, problem in figures.get("broken_named", {}).items():
        lines.append(f"  broken: {name}: {problem}")
    return "\n".join(lines)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table_of(name: str, rows: Mapping[str, Any]) -> str:
    """Formats a group of scores as a table with a line for each score.

    A score that is a number has one column. A score that consists of several numbers has a column for each of them.
    """
    nested = {key: row for key, row in rows.items() if isinstance(row, dict)}
    if not nested:
        return table((name, ""), [(key, _figure(value)) for key, value in rows.items()], right=(1,))
    columns = list(next(iter(nested.values())))
    cells = [[key, *[_figure(row[column]) for column in columns]] for key, row in nested.items()]
    title = " ".join([name, *[str(value) for value in rows.values() if not isinstance(value, dict)]])
    return table((title, *columns), cells, right=tuple(range(1, len(columns) + 1)))
