"""Lists the formats that a search tries for each part of a model, and writes them as flags of ``calibrate``.

The parts are the vision encoder, the bridge, and the language model (all other graphs together). They are separate
graphs. So each format of a part is made and measured once, and the times and the bytes of the parts are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

from blip2edge.bundle.schema import BRIDGE, DECODER, VISION
from blip2edge.calibration.formats import FLOAT, FP16, W8A8, FormatRule, GraphFormat, NumberFormat
from blip2edge.calibration.targets import Product
from blip2edge.calibration.weights.blocks import BLOCKS, BlockFormat
from blip2edge.choices import WEIGHT_BITS

LANGUAGE = "language"
PART_STAGES = {VISION: ("vision",), BRIDGE: ("bridge",), LANGUAGE: ("prefill", "decode")}
"""The stages of a caption in which the graphs of each part (such as the bridge) run."""


LEAST_BLOCK = 32
"""The smallest block that is tried, in rows. In smaller blocks, scales need as many bytes as the 4-bit integers."""


@dataclass(frozen=True)
class PartChoice:
    """One format for one part of the model (vision encoder, bridge or language model).

    Attributes:
        part: Name of the part: ``vision_encoder``, ``bridge`` or ``language``.
        form: The format of the part's graphs.
        note: Text after the format's name, if single matrices have another format.
    """

    part: str
    form: GraphFormat
    note: str = ""

    @property
    def name(self) -> str:
        """Name of the format in tables: ``int4/64``, or ``int4, 3 layers in int8``."""
        return f"{self.form.whole}{', ' if self.note else ''}{self.note}"

    @property
    def is_float(self) -> bool:
        """Whether the part of the model stays as it is in the original bundle (format ``float``)."""
        return self.form.whole.kind == FLOAT


@dataclass(frozen=True)
class PartGraphs:
    """The graphs of each part of a model (vision encoder, bridge, language model).

    Attributes:
        graphs: Names of the graphs of each part, by the part's name.
        running: Names of the graphs that run while a picture is captioned.
    """

    graphs: Mapping[str, tuple[str, ...]]
    running: frozenset[str]

    @classmethod
    def of(cls, graphs: Iterable[str], running: Iterable[str]) -> PartGraphs:
        """Groups the graphs of a bundle by part of the model. Without a bridge, there is no part ``bridge``."""
        names = list(graphs)
        single = {name: (name,) for name in (VISION, BRIDGE) if name in names}
        rest = tuple(name for name in names if name not in single)
        return cls({**single, LANGUAGE: rest}, frozenset(running))

    def form_of(self, graph: str, choice: PartChoice) -> GraphFormat:
        """Returns the format of a graph that belongs to a part (vision encoder, bridge, language model).

        A graph that does not run while pictures are captioned has no recorded inputs: its weights become INT8 in
        blocks, unless ``choice`` is a floating-point format. Only the graph of the vision encoder, the bridge or the
        decoder gets the formats for single matrices.
        """
        if graph not in self.running and choice.form.whole.kind in (W8A8, *WEIGHT_BITS):
            return GraphFormat(NumberFormat("int8"))
        return choice.form if graph in (choice.part, DECODER) else GraphFormat(choice.form.whole)

    def rules(self, choices: Mapping[str, PartChoice]) -> list[FormatRule]:
        """Returns the formats of a combination as ``--format`` rules: one for each graph, and one for each pattern."""
        found = []
        for part, choice in choices.items():
            for graph in self.graphs[part]:
                form = self.form_of(graph, choice)
                found.append(FormatRule(graph, form.whole))
                found += [FormatRule(graph, own, pattern) for pattern, own in form.patterns]
        return found

    def flags(self, choices: Mapping[str, PartChoice]) -> str:
        """Returns the flags with which ``calibrate`` without a search makes a combination, as short as possible."""
        language = choices[LANGUAGE].form.whole
        base = language.kind if language.kind in WEIGHT_BITS else "none"
        usual = {name: NumberFormat(W8A8) for name in (VISION, BRIDGE)}
        plain = PartChoice(LANGUAGE, GraphFormat(NumberFormat(FLOAT if base == "none" else base)))
        usual |= {name: self.form_of(name, plain).whole for name in self.graphs[LANGUAGE]}
        rules = [rule for rule in self.rules(choices) if rule.pattern or rule.form != usual[rule.graph]]
        return " ".join([f"--weights {base}", *(f"--format {quote(str(rule))}" for rule in rules)])


def plain_choices(
    part: str, products: Sequence[Product], *, half: bool, refused: Sequence[str] = (), sizes: bool = True
) -> list[PartChoice]:
    """Lists the formats that are tried for a part (such as the bridge), without formats for single matrices.

    A block size is left out if it changes no matrix.

    Args:
        part: Name of the part.
        products: The matrix multiplications (MatMul nodes) of the part's graphs.
        half: Whether the original weights have 32 bits, so that FP16 halves their size.
        refused: Kinds of formats that the target does not run.
        sizes: Whether blocks of other sizes than the default are tried, down to :data:`LEAST_BLOCK`.
    """
    forms = [NumberFormat(FLOAT), *([NumberFormat(FP16)] if half else []), NumberFormat(W8A8)]
    widths = sorted({product.inner for product in products})
    for kind, bits in WEIGHT_BITS.items():
        made: list[tuple[BlockFormat | None, ...]] = []
        for block in (0, *(size for size in BLOCKS[bits] if sizes and size >= LEAST_BLOCK)):
            form = NumberFormat(kind, block)
            blocks = tuple(form.for_width(width) for width in widths)
            if any(blocks) and blocks not in made:
                made.append(blocks)
                forms.append(form)
    return [PartChoice(part, GraphFormat(form)) for form in forms if form.kind not in refused]


def presets(parts: Iterable[str]) -> dict[str, dict[str, PartChoice]]:
    """Returns the combinations of formats that ``calibrate`` makes without a search, and the original formats.

    Args:
        parts: Names of the model's parts (vision encoder, bridge, language model).

    Returns:
        The format of each part, by the flags of ``calibrate`` that make the combination.
    """
    names = list(parts)
    found: dict[str, dict[str, PartChoice]] = {}
    for flags, language in (
        ("--weights int8 (the default)", "int8"),
        ("--weights int4", "int4"),
        ("--weights none", FLOAT),
    ):
        kinds = {part: language if part == LANGUAGE else W8A8 for part in names}
        found[flags] = {part: PartChoice(part, GraphFormat(NumberFormat(kind))) for part, kind in kinds.items()}
    found["the original bundle"] = {part: PartChoice(part, GraphFormat(NumberFormat(FLOAT))) for part in names}
    return found
