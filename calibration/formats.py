"""The number format of each graph of a calibrated bundle, and of single matrices in it (``calibrate --format``).

--format vision_encoder=float              the graph stays as it is
--format decoder=int4/32                   weights in blocks of 32 inputs
--format 'decoder:*.layers.0.*=int8'       the same graph's matrices whose names match have another format
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from blip2edge.bundle.schema import BRIDGE, VISION
from blip2edge.calibration.pictures import DEFAULT_COUNT
from blip2edge.calibration.weights.blocks import BLOCKS, BlockFormat
from blip2edge.choices import WEIGHT_BITS
from blip2edge.errors import UsageError, option
from blip2edge.limits import DEFAULT_LIMITS

FLOAT, FP16, W8A8 = "float", "fp16", "w8a8"
KINDS = (FLOAT, FP16, W8A8, *WEIGHT_BITS)
INT8_ACTIVATIONS = (VISION, BRIDGE)
"""Graphs whose activations become INT8 by default."""

QUANTIZATION = {
    "method": "smooth",
    "activations": INT8_ACTIVATIONS,
    "weights": "int8",
    "formats": (),
    "drop_limit": None,
    "count": DEFAULT_COUNT,
    "limits": DEFAULT_LIMITS,
}
"""Defaults of the options of ``calibrate`` that have an effect only with ``images``."""

KEPT = "kept in floating point by its format (--format)"

RULE = re.compile(r"(?P<graph>[^:=]+)(:(?P<pattern>.+))?=(?P<format>[^=]+)")


@dataclass(frozen=True, order=True)
class NumberFormat:
    """The number format of a graph or of a matrix.

    Attributes:
        kind: ``float`` (as before calibration), ``fp16`` (weights are stored in FP16, and computed in the original
            precision), ``w8a8`` (activations and weights in INT8), ``int8`` or ``int4`` (weights in blocks).
        block: Largest number of inputs that share a scale; 0 for the default of ``int8`` and ``int4``.
    """

    kind: str
    block: int = 0

    @classmethod
    def parse(cls, text: str) -> NumberFormat:
        """Converts a text such as ``int4/32`` or ``float`` to a format; raises UsageError for any other text."""
        kind, slash, block = text.partition("/")
        bits = WEIGHT_BITS.get(kind)
        sizes = tuple(map(str, BLOCKS[bits])) if bits is not None else ()
        if kind not in KINDS or (slash and block not in sizes):
            known = [*KINDS, *(f"{name}/{size}" for name, own in WEIGHT_BITS.items() for size in BLOCKS[own])]
            raise UsageError(f"{option('format')}: expected one of {', '.join(known)}, got {text}", field="format")
        return cls(kind, int(block) if slash else 0)

    def __str__(self) -> str:
        return f"{self.kind}/{self.block}" if self.block else self.kind

    @property
    def bits(self) -> int | None:
        """Bits of a weight if the weights are integers in blocks (``int8``, ``int4``); None for other kinds."""
        return WEIGHT_BITS.get(self.kind)

    def for_width(self, width: int) -> BlockFormat | None:
        """Returns the block format of a matrix with ``width`` inputs.

        Returns:
            None if the format has no blocks, or if no block size fits the width.
        """
        return None if self.bits is None else BlockFormat.for_width(width, self.bits, self.block)


@dataclass(frozen=True)
class GraphFormat:
    """The number format of one graph.

    Attributes:
        whole: The format of the graph's matrices.
        patterns: Name patterns of matrices that have another format, each with this format. If several patterns match a
            name, the last one counts.
    """

    whole: NumberFormat
    patterns: tuple[tuple[str, NumberFormat], ...] = ()

    def of(self, weight: str) -> NumberFormat:
        """Returns the format of the matrix whose initializer has the name ``weight``."""
        matching = [form for pattern, form in self.patterns if fnmatchcase(weight, pattern)]
        return matching[-1] if matching else self.whole

    def without_inputs(self) -> GraphFormat:
        """Returns the format for a graph without recorded inputs: INT4 becomes INT8, because INT4 needs inputs."""
        return replace(self, whole=NumberFormat("int8")) if self.whole.kind == "int4" else self

    def __str__(self) -> str:
        return " ".join([str(self.whole), *(f"{pattern}={form}" for pattern, form in self.patterns)])


@dataclass(frozen=True)
class FormatRule:
    """The value of one ``--format`` flag.

    Attributes:
        graph: Name of the graph.
        form: The format.
        pattern: Pattern of the matrices' names; empty for the whole graph.
    """

    graph: str
    form: NumberFormat
    pattern: str = ""

    @classmethod
    def parse(cls, text: str) -> FormatRule:
        """Converts ``GRAPH=FORMAT`` or ``GRAPH:PATTERN=FORMAT`` to a rule; raises UsageError for any other text."""
        match = RULE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{option('format')}: expected GRAPH=FORMAT or GRAPH:PATTERN=FORMAT, got {text}", field="format"
            )
        return cls(match["graph"], NumberFormat.parse(match["format"]), match["pattern"] or "")

    def __str__(self) -> str:
        return f"{self.graph}{':' if self.pattern else ''}{self.pattern}={self.form}"


def choose_graph_formats(
    graphs: Iterable[str], activations: Sequence[str], weights: str | None, rules: Sequence[FormatRule] = ()
) -> dict[str, GraphFormat]:
    """Chooses the format of each graph from the flags of ``calibrate``.

    Args:
        graphs: Names of the graphs of the original bundle.
        activations: Names of the graphs whose activations become INT8.
        weights: Type of the weights of the other graphs; the vision encoder is not among them. None leaves the weights
            unchanged.
        rules: Formats of single graphs; they replace the formats that follow from the other flags.

    Returns:
        The format of each graph, by name.

    Raises:
        UsageError: A rule names no graph of the original bundle, or the flags give a graph two formats that cannot be
            combined.
    """
    found: dict[str, GraphFormat] = {}
    for name in graphs:
        plain = NumberFormat(W8A8 if name in activations else FLOAT)
        if plain.kind == FLOAT and name != VISION and weights is not None:
            plain = NumberFormat(weights)
        whole = [rule.form for rule in rules if rule.graph == name and not rule.pattern]
        patterns = tuple((rule.pattern, rule.form) for rule in rules if rule.graph == name and rule.pattern)
        found[name] = GraphFormat(whole[-1] if whole else plain, patterns)
        _check_patterns(name, found[name])
    unknown = sorted({rule.graph for rule in rules} - set(found))
    if unknown:
        raise UsageError(
            f"{option('format')}: expected one of the graphs {', '.join(found)}, got {', '.join(unknown)}",
            field="format",
        )
    return found


def check_matches(rules: Iterable[FormatRule], weights_of: Callable[[str], Sequence[str]]) -> None:
    """Checks that the pattern of each ``--format`` flag matches a matrix.

    Args:
        rules: The values of the flags.
        weights_of: Returns the names of the matrices of a graph.

    Raises:
        UsageError: A pattern matches no matrix.
    """
    for rule in rules:
        names = weights_of(rule.graph) if rule.pattern else []
        if rule.pattern and not any(fnmatchcase(name, rule.pattern) for name in names):
            nearest = get_close_matches(rule.pattern, names, 3, 0.0)
            raise UsageError(
                f"{option('format')}: the pattern {rule.pattern} matches no matrix of {rule.graph}",
                f"the nearest names are {', '.join(nearest)}" if nearest else f"{rule.graph} has no such matrices",
                field="format",
            )


def check_inputs(rules: Iterable[FormatRule], recorded: Callable[[str], object]) -> None:
    """Raises UsageError if a ``--format`` flag needs the recorded inputs of a graph, but none were recorded.

    Inputs are recorded only for graphs that run while pictures are captioned.

    Args:
        rules: The values of the flags.
        recorded: Returns a true value if inputs of the graph with this name were recorded.
    """
    for rule in rules:
        if rule.form.kind in (W8A8, "int4") and not recorded(rule.graph):
            raise UsageError(
                f"{option('format')}: {rule.form} needs recorded inputs of the graph {rule.graph}, which does not run "
                "while pictures are captioned",
                f"give {rule.graph} the format int8, fp16 or float",
                field="format",
            )


def _check_patterns(graph: str, form: GraphFormat) -> None:
    """Raises UsageError if the formats for single matrices cannot be combined with the format of the whole graph."""
    blocks = form.whole.bits is not None
    fitting = [FLOAT, *WEIGHT_BITS] if blocks else [FLOAT] if form.whole.kind == W8A8 else []
    for pattern, own in form.patterns:
        if own.kind not in fitting:
            raise UsageError(
                f"{option('format')}: {graph} is in {form.whole}, so its matrices {pattern} cannot be in {own}",
                f"expected one of {', '.join(fitting)}" if fitting else "give the whole graph a format of integers",
                field="format",
            )


def check_nothing_to_quantize(given: Mapping[str, object]) -> None:
    """Raises UsageError for an option of the quantization whose value is not the default, if nothing is quantized.

    Args:
        given: The value of each option of ``calibrate`` that needs ``images``, by name.
    """
    for name, value in given.items():
        if (tuple(value) if isinstance(value, (list, tuple)) else value) != QUANTIZATION[name]:
            raise UsageError(
                f"{option(name)} has no effect without {option('images')}: nothing is quantized",
                f"give {option('images')}, or leave {option(name)} out",
                field=name,
            )
