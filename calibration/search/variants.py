"""Makes the graphs of each format once, stores them in the directory of the search, and makes bundles of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.outputs.publishing import staged
from blip2edge.bundle.schema import DERIVED
from blip2edge.bundle.trust.integrity import STAMPS, FileRecord
from blip2edge.calibration.agreement import Cosine
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.formats import FLOAT, GraphFormat, NumberFormat
from blip2edge.calibration.pipeline import graph_headroom, in_format
from blip2edge.calibration.results import CalibratedGraph, MatrixSummary, StagedGraph
from blip2edge.calibration.sealing import copy_rest, seal
from blip2edge.calibration.search.choices import PartChoice, PartGraphs
from blip2edge.calibration.search.journal import SearchJournal
from blip2edge.errors import DataError
from blip2edge.reading import read_json
from blip2edge.runtime.backends.optimized_copy import KIND, OptimizedRecord

GRAPH_JSON = "graph.json"
COPY = f"{KIND}/cpu"

Optimizer = Callable[[Path, Sequence[str]], Any]
"""Function that makes the optimized copy of some graphs of a bundle, for the CPU.

Its arguments are the bundle's directory and the names of the graphs.
"""


def staged_to_json(graph: StagedGraph) -> dict[str, Any]:
    """Returns a calibrated graph as a JSON object, without its plan and its headroom."""
    summary = graph.summary
    return {
        "record": graph.record.to_json(),
        "seals": {name: dict(vars(seal)) for name, seal in graph.seals.items()},
        "summary": {
            **vars(summary),
            "kept_float": dict(summary.kept_float),
            "cosine": {name: asdict(value) for name, value in summary.cosine.items()},
            "matrices": {name: asdict(value) for name, value in summary.matrices.items()},
        },
        "details": [dict(detail) for detail in graph.details],
    }


def staged_from_json(name: str, values: Mapping[str, Any]) -> StagedGraph:
    """Restores a calibrated graph from a JSON object of :func:`staged_to_json`."""
    summary = values["summary"]
    return StagedGraph(
        GraphRecord.from_json(name, values["record"]),
        {file: FileRecord(**seal) for file, seal in values["seals"].items()},
        CalibratedGraph(
            **{
                **summary,
                "cosine": {output: Cosine(**value) for output, value in summary["cosine"].items()},
                "matrices": {
                    weight: MatrixSummary(**{**matrix, "shape": tuple(matrix["shape"])})
                    for weight, matrix in summary["matrices"].items()
                },
            }
        ),
        values["details"],
    )


def put_files(source: Path, target: Path, but: Sequence[str] = (), *, link: bool = False) -> None:
    """Copies the files of a directory into another directory, or links them.

    ONNX Runtime can read files with several hard links; onnx and onnx_ir refuse them. So links are used only in bundles
    that are run and not changed.

    Args:
        source: The directory.
        target: The other directory.
        but: Names of files that are not copied.
        link: Whether to make hard links if the system can.
    """
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if file.is_file() and name.name not in (*but, STAMPS):
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not (link and _linked(file, place)):
                shutil.copyfile(file, place)


def _linked(file: Path, place: Path) -> bool:
    """Makes a hard link at ``place``; returns False if the file system has no hard links.

    Raises:
        FileExistsError: ``place`` exists. A copy to it would change the linked file too.
    """
    try:
        os.link(file, place)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        return False
    return True


@dataclass(frozen=True)
class Variants:
    """Makes graphs in the formats of a search, and bundles of these graphs.

    Attributes:
        context: The calibration; its staging directory is not used.
        journal: The stored results of the finished steps.
        parts: The graphs of each part of the model (vision encoder, bridge, language model).
        optimizer: Makes optimized copies; None to use the exported (not optimized) graphs.
        copies: Whether times and captions are measured with the optimized copies. If False, the copies are only
            published.
    """

    context: CalibrationContext
    journal: SearchJournal
    parts: PartGraphs
    optimizer: Optimizer | None
    copies: bool = True

    @property
    def runs_copies(self) -> bool:
        """Whether times and captions are measured with optimized copies."""
        return self.copies and self.optimizer is not None

    def graph(self, graph: str, form: GraphFormat) -> Path:
        """Returns the directory of a graph's files in a format; the files are written at the first call."""

        def fill(folder: Path) -> None:
            context = replace(self.context, staging=folder)
            made = in_format(context, context.parent.graph(graph), form)
            text = json.dumps(staged_to_json(made), ensure_ascii=False)
            (folder / GRAPH_JSON).write_text(text, encoding="utf-8")

        return self.journal.folder(f"{graph}-{file_name(str(form))}", fill)

    def made(self, graph: str, form: GraphFormat) -> StagedGraph:
        """Returns the manifest's record and the results of a graph in a format; the graph is made at the first call."""
        return staged_from_json(graph, read_json(self.graph(graph, form) / GRAPH_JSON, DataError))

    def headroom(self, graph: str) -> dict[str, Any] | None:
        """Returns the FP16 headroom of the original graph (65504 / largest value, of each tensor) for the report.

        The headroom is measured at the first call. It is None if no inputs of the graph were recorded.
        """
        record = self.context.parent.graph(graph)
        found: dict[str, Any] | None = self.journal.value(
            f"headroom-{graph}", lambda: graph_headroom(self.context, record)
        )
        return found

    def prepared(self, context: CalibrationContext, record: GraphRecord, form: GraphFormat) -> StagedGraph:
        """Puts a graph in a format into the staging directory of a calibration."""
        name = record.spec.name
        put_files(self.graph(name, form), context.staging, but=(GRAPH_JSON,))
        return replace(self.made(name, form), headroom=self.headroom(name))

    def bundle(self, choices: Mapping[str, PartChoice], *, copies: bool = True) -> Path:
        """Returns the directory of a bundle with the chosen format of each part; made at the first call.

        Args:
            choices: The format of each part.
            copies: Whether the bundle needs the optimized copies, for times and captions.
        """

        def fill(folder: Path) -> None:
            context = replace(self.context, staging=folder)
            graphs = {}
            for part, choice in choices.items():
                for graph in self.parts.graphs[part]:
                    form = self.parts.form_of(graph, choice)
                    put_files(self.graph(graph, form), folder, but=(GRAPH_JSON,), link=True)
                    graphs[graph] = self.made(graph, form)
            copy_rest(context.parent, folder)
            order = {name: graphs[name] for name in context.parent.manifest.graphs}
            seal(context, order).write(folder)

        name = "bundle-" + file_name("+".join(str(choice.form) for choice in choices.values()))
        folder = self.journal.folder(name, fill)
        if copies and self.copies and self.optimizer is not None and not (folder / COPY).exists():
            self._add_copies(folder, choices, self.optimizer)
        return folder

    def _add_copies(self, folder: Path, choices: Mapping[str, PartChoice], optimizer: Optimizer) -> None:
        """Adds the optimized copies of all graphs to a bundle that is only measured, not published."""
        made = self.journal.folder(
            f"copy-of-{folder.name}",
            partial(self._fill_copy, choices=choices, bundle=folder, optimizer=optimizer, link=True),
        )
        (folder / KIND).mkdir(exist_ok=True)
        made.rename(folder / COPY)

    def publish_copies(self, bundle: Path, choices: Mapping[str, PartChoice]) -> None:
        """Adds the optimized copies of the chosen formats to the published bundle, if there is an optimizer."""
        if self.optimizer is not None:
            with staged(bundle / COPY, force=True, marker=None) as folder:
                self._fill_copy(folder, choices, bundle, self.optimizer)

    def _fill_copy(
        self,
        place: Path,
        choices: Mapping[str, PartChoice],
        bundle: Path,
        optimizer: Optimizer,
        *,
        link: bool = False,
    ) -> None:
        """Joins the optimized copies of vision encoder, bridge and language model into one, in the folder ``place``."""
        copies = [self._copy(part, choice, optimizer) for part, choice in choices.items()]
        records = [OptimizedRecord.from_json(read_json(copy / DERIVED[KIND], DataError)) for copy in copies]
        for copy in copies:
            put_files(copy, place, but=(DERIVED[KIND],), link=link)
        replace(
            records[0],
            bundle_sha256=Bundle.open(bundle).sha256,
            graphs={name: graph for one in records for name, graph in one.graphs.items()},
            left={name: why for one in records for name, why in one.left.items()},
            files={name: file for one in records for name, file in one.files.items()},
        ).write(place)

    def _copy(self, part: str, choice: PartChoice, optimizer: Optimizer) -> Path:
        """Returns the directory with the optimized copy of a part (such as the bridge) in a format.

        The copy is made in a bundle whose other parts are those of the original bundle.
        """
        graphs = self.parts.graphs[part]

        def fill(place: Path) -> None:
            alone = place / "bundle"
            alone.mkdir()
            context = replace(self.context, staging=alone)
            made = {}
            names = list(context.parent.manifest.graphs)
            last = max(map(names.index, graphs))
            for at, name in enumerate(names):
                form = self.parts.form_of(name, choice) if name in graphs else GraphFormat(NumberFormat(FLOAT))
                put_files(self.graph(name, form), alone, but=(GRAPH_JSON,), link=at > last)
                made[name] = self.made(name, form)
            copy_rest(context.parent, alone)
            seal(context, made).write(alone)
            optimizer(alone, graphs)
            for file in (alone / COPY).iterdir():
                file.rename(place / file.name)
            shutil.rmtree(alone)

        return self.journal.folder(f"copy-{part}-{file_name(str(choice.form))}", fill)


def file_name(text: str) -> str:
    """Makes a file name from a text: characters except letters, digits, ``-``, ``+`` and ``.`` become ``_``.

    If two texts could get the same name, or the name is too long, the name ends with a hash of the text.
    """
    plain = "".join(letter if letter.isalnum() or letter in "-+." else "_" for letter in text)
    if len(plain) <= 60 and plain == text.replace("/", "_"):
        return plain
    return f"{plain[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
