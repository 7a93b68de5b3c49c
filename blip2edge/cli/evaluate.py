"""``blip2edge eval``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from blip2edge.cli.files import write
from blip2edge.cli.running_flags import given_generation
from blip2edge.cli.table import table
from blip2edge.errors import UsageError
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from pathlib import Path

    from blip2edge.training.data.config import DataConfig
    from blip2edge.training.evaluation.models import ModelOptions

SCENES = "scenes"
SCENES_COUNT = 1000  # pictures, where nothing is said
_TEXTS = ("wrong", "broken_named")  # figures that are lists of texts


def evaluate(options: argparse.Namespace) -> int:
    """Score a checkpoint or a bundle on scenes or on data from files, and print the figures."""
    from blip2edge.training.evaluation.open_model import open_model
    from blip2edge.training.evaluation.scoring import ScoringOptions, score_entries, score_scenes

    data = None if options.data == SCENES else _entries(options)
    if data is None and options.count is not None and options.count < 2:
        raise UsageError(f"--count: at least 2 pictures are expected, not {options.count}")
    model = open_model(options.model, model_options(options))
    if options.predictions is not None and (data is None or model.captioner is None):
        raise UsageError("--predictions: expected a model that answers, and data from a file", "leave it out")
    with Progress() as progress:
        wanted = ScoringOptions(
            tuple(options.metrics or ()),
            options.prompt,
            options.top,
            options.ask,
            lambda done, total: progress("scoring", done, total),
        )
        if data is None:
            figures = score_scenes(model, options.count or SCENES_COUNT, options.split, wanted)
        else:
            figures = score_entries(model, *data, wanted)
    predictions = figures.pop("predictions", None)
    if options.predictions is not None:
        write(options.predictions, json.dumps(predictions) + "\n", "--predictions")
    print(json.dumps(figures) if options.json else text_of(figures))
    return 0


def model_options(options: argparse.Namespace) -> ModelOptions:
    """How the model is run, by the flags."""
    from blip2edge.training.evaluation.models import ModelOptions

    return ModelOptions(options.backend, options.threads, options.batch_size, given_generation(options))


def data_config(options: argparse.Namespace) -> tuple[DataConfig, Path]:
    """What --data names, and the directory that its paths are relative to.

    Raises:
        DataError: It is nothing that is known.
        ConfigError: A recipe with a wrong section [data].
    """
    from blip2edge.training.data.detect import detect_data

    return detect_data(options.data, options.images, options.annotations, options.max_broken)


def _entries(options: argparse.Namespace) -> tuple[Any, Any]:
    from blip2edge.training.data.registry import read_entries

    config, base = data_config(options)
    entries, broken = read_entries(config, base=base)
    listed = list(entries)
    if options.count is not None:
        from blip2edge.training.data.entries import by_picture

        listed = [entry for shown in by_picture(listed)[: options.count] for entry in shown.entries]
    return listed, broken


def text_of(figures: Mapping[str, Any]) -> str:
    """The figures for people: a line each, tables where there are several of a kind, then what was wrong."""
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
    """A group of figures: one column, or as many as each row has."""
    nested = {key: row for key, row in rows.items() if isinstance(row, dict)}
    if not nested:
        return table((name, ""), [(key, _figure(value)) for key, value in rows.items()], right=(1,))
    columns = list(next(iter(nested.values())))
    cells = [[key, *[_figure(row[column]) for column in columns]] for key, row in nested.items()]
    title = " ".join([name, *[str(value) for value in rows.values() if not isinstance(value, dict)]])
    return table((title, *columns), cells, right=tuple(range(1, len(columns) + 1)))
