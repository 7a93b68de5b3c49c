"""Makes vision encoder, bridge and language model in several formats, measures them, and combines the formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE
from blip2edge.calibration.formats import FLOAT, W8A8, GraphFormat, NumberFormat
from blip2edge.calibration.search.choices import (
    LANGUAGE,
    PartChoice,
    plain_choices,
    presets,
)
from blip2edge.calibration.search.front import (
    FormatPoint,
    FoundPoints,
    PointLimits,
    allowed,
    choose_point,
    pareto,
    to_measure,
)
from blip2edge.calibration.search.measure import (
    FASTER,
    StageTimer,
    Workload,
    captions_lost,
    part_nats,
    slower_kinds,
)
from blip2edge.calibration.search.mixed import mixed_choices
from blip2edge.calibration.search.predicted import BoardTimer
from blip2edge.calibration.targets import find_targets
from blip2edge.graph_files import load_graph
from blip2edge.progress import counted
from blip2edge.runtime.bench.devices import Board

SCORED = 32
"""Number of pictures whose captions are compared."""

MEASURED = 12
"""Number of combinations on the predicted Pareto front whose captions are compared.

The combinations that ``calibrate`` makes without a search are compared in addition.
"""

MIXED = "mixed"

MORE = 4
"""Largest number of further combinations to compare, if no combination that was compared is within the limits.

The captions of a combination (of formats) are compared with those of the original bundle.
"""


@dataclass(frozen=True)
class SearchOptions:
    """The limits of a search, the board for which it searches, and the number of measurements.

    Attributes:
        limits: The limits on loss, time and size.
        board: The board whose time is predicted; None to measure the time on this machine.
        scored: Number of pictures whose captions are compared.
        measured: Number of combinations to compare by their captions, out of the predicted Pareto front.
        formats: Names of the formats to try; the name :data:`MIXED` stands for two formats in one graph. If empty, all
            formats are tried.
    """

    limits: PointLimits = field(default_factory=PointLimits)
    board: Board | None = None
    scored: int = SCORED
    measured: int = MEASURED
    formats: tuple[str, ...] = ()


@dataclass
class FormatSearch:
    """Measures combinations of formats, and chooses one of them.

    Attributes:
        work: The pictures, and the graphs of all formats.
        options: Limits, board and size of the search.
        choices: The formats that are tried for each part (vision encoder, bridge, language model), by the part's name.
        combinations: The combinations: the format of each part. The keys are the flags with which ``calibrate`` makes
            the combination.
        losses: Measured loss of the captions in percentage points and change of the next token in nats. The keys are
            those of ``combinations``.
    """

    work: Workload
    options: SearchOptions
    choices: dict[str, list[PartChoice]] = field(default_factory=dict)
    combinations: dict[str, dict[str, PartChoice]] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._timer = StageTimer(self.work)
        self._sizes: dict[PartChoice, int] = {}
        self._parts = self.work.variants.parts
        board = self.options.board
        self._board = (
            None
            if board is None
            else BoardTimer(self.work.context.parent, board, self.work.tokens, self.work.prompt_tokens)
        )
        self._presets = {self._parts.flags(choices): name for name, choices in presets(self._parts.graphs).items()}

    def run(self) -> FoundPoints:
        """Makes and measures the formats; returns all combinations and the chosen combination."""
        self.choices = {part: self._choices_of(part) for part in self._parts.graphs}
        longest = max(map(len, self.choices.values()))
        if self._board is None:
            self._timer.time(
                [{part: choices[at % len(choices)] for part, choices in self.choices.items()} for at in range(longest)]
            )
        every = [dict(zip(self._parts.graphs, chosen, strict=True)) for chosen in product(*self.choices.values())]
        self.combinations = {self._parts.flags(choices): choices for choices in every}
        wanted = [point.flags for point in to_measure(self._points(), self.options.limits, self.options.measured)]
        first = list(dict.fromkeys([*(flags for flags in self._presets if flags in self.combinations), *wanted]))
        report = self.work.context.progress
        for flags in counted(first, len(first), partial(report, "captions of combinations")):
            self._measure(flags)
        if self._board is None:
            self._timer.time([self.combinations[flags] for flags in self.losses])
        self._measure_more()
        points = self._points()
        measured = [point for point in points if point.drop is not None]
        chosen = choose_point(measured, self.options.limits)
        rules = self._parts.rules(self.combinations[chosen.point.flags])
        return FoundPoints(points, pareto(measured), chosen, rules, self.work.journal.cpu_s)

    def _choices_of(self, part: str) -> list[PartChoice]:
        """Lists the formats that are tried for a part (such as the bridge), and makes its graphs in each format."""
        parent = self.work.context.parent
        running = [graph for graph in self._parts.graphs[part] if graph in self._parts.running]
        products = [
            one
            for graph in running
            for one in find_targets(load_graph(parent.file(parent.graph(graph).spec.file))).products
        ]
        refused = [] if self._board is None else self._board.refused
        half = parent.manifest.precision == "fp32"
        found = plain_choices(part, products, half=half, refused=refused, sizes=part == LANGUAGE)
        tried = self.options.formats
        if tried:
            found = [choice for choice in found if choice.is_float or choice.name in tried]
        kinds = {choice.form.whole.kind for choice in found}
        if part != LANGUAGE and W8A8 in kinds and self._board is None:
            slower = slower_kinds(self.work.context, part, self.work.journal)
            if slower:
                patterns = tuple((pattern, NumberFormat(FLOAT)) for pattern in slower)
                note = f"{len(slower)} kinds of matrices in float"
                found.append(PartChoice(part, GraphFormat(NumberFormat(W8A8), patterns), note))
        for at, choice in enumerate(found):
            self.work.context.progress(f"formats of {part}", at, len(found))
            for graph in self._parts.graphs[part]:
                self.work.variants.graph(graph, self._parts.form_of(graph, choice))
        four = [choice for choice in found if choice.form.whole.kind == "int4"]
        if part == LANGUAGE and four and (not tried or MIXED in tried):
            found += mixed_choices(self.work, four[0], NumberFormat(FLOAT if "int8" in refused else "int8"))
        return found

    def _points(self) -> list[FormatPoint]:
        """Returns time, size and loss of each combination of formats; the loss is measured or predicted."""
        return [self._point(flags, choices) for flags, choices in self.combinations.items()]

    def _point(self, flags: str, choices: Mapping[str, PartChoice]) -> FormatPoint:
        stages: dict[str, float] = {"preprocess": self._preprocess_ms()}
        nats, proven = 0.0, True
        for part, choice in choices.items():
            stages |= self._ms(part, choice)
            nats += part_nats(self.work, {part: choice})
            proven = proven and (choice.is_float or self._is_proven(part, choice))
        drop, measured = self.losses.get(flags, (None, nats))
        return FormatPoint(
            names={part: choice.name for part, choice in choices.items()},
            flags=flags,
            ms=sum(stages.values()),
            stages=stages,
            bytes=sum(self._bytes(part, choice) for part, choice in choices.items()),
            nats=measured,
            drop=drop,
            proven=proven,
            preset=self._presets.get(flags, ""),
        )

    def _preprocess_ms(self) -> float:
        return self._timer.ms("", "")["preprocess"] if self._board is None else self._board.preprocess_ms()

    def _ms(self, part: str, choice: PartChoice) -> Mapping[str, float]:
        if self._board is None:
            return self._timer.ms(part, str(choice.form))
        sizes = {graph: self._weight_bytes(graph, choice) for graph in self._parts.graphs[part]}
        return self._board.ms(part, choice.form, sizes)

    def _is_proven(self, part: str, choice: PartChoice) -> bool:
        """Returns whether a part (such as the bridge) is proven faster in a format than in the original format."""
        parent = next(one for one in self.choices[part] if one.is_float)
        return sum(self._ms(part, choice).values()) < FASTER * sum(self._ms(part, parent).values())

    def _bytes(self, part: str, choice: PartChoice) -> int:
        """Returns the size in bytes of a part of the model, such as the bridge.

        The size of the language model includes the token table.
        """
        if choice not in self._sizes:
            graphs = [
                self.work.variants.made(graph, self._parts.form_of(graph, choice)) for graph in self._parts.graphs[part]
            ]
            table = self._table_bytes(choice) if part == LANGUAGE else 0
            self._sizes[choice] = sum(graph.summary.bytes for graph in graphs) + table
        return self._sizes[choice]

    def _table_bytes(self, choice: PartChoice) -> int:
        own = self.work.variants.graph(DECODER, choice.form) / EMBEDDINGS_FILE
        record = self.work.context.parent.manifest.files.get(EMBEDDINGS_FILE)
        return own.stat().st_size if own.is_file() else 0 if record is None else record.size

    def _weight_bytes(self, graph: str, choice: PartChoice) -> int:
        """Returns the bytes of a graph; a head that shares the file of the token embedding table is counted too."""
        staged = self.work.variants.made(graph, self._parts.form_of(graph, choice))
        shared = EMBEDDINGS_FILE in staged.record.data_files
        return staged.summary.bytes + (self._table_bytes(choice) if shared else 0)

    def _measure(self, flags: str) -> None:
        choices = self.combinations[flags]
        drop = 0.0 if all(one.is_float for one in choices.values()) else captions_lost(self.work, choices).drop
        self.losses[flags] = (drop, part_nats(self.work, choices))

    def _measure_more(self) -> None:
        """Measures further combinations, with the least predicted loss first, until a measured one may be published.

        At most :data:`MORE` combinations are measured.
        """
        limits = self.options.limits
        for at in range(MORE):
            possible = allowed(self._points(), limits)  # a point that is not measured counts as without loss
            if not possible or any(point.drop is not None for point in possible):
                return
            self.work.context.progress("captions of more combinations", at, MORE)
            self._measure(min(possible, key=lambda point: (point.nats, point.ms)).flags)
