"""Measures combinations of formats for a search: time of each stage, loss of the captions, change of the next token."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.calibration.agreement import GreedyCaption, caption_pictures, compare_captions
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.formats import FLOAT, GraphFormat, NumberFormat
from blip2edge.calibration.pictures import CalibrationPicture
from blip2edge.calibration.search.choices import PART_STAGES, PartChoice
from blip2edge.calibration.search.drop_limit import DropLimit
from blip2edge.calibration.search.journal import SearchJournal
from blip2edge.calibration.search.sensitivity import PICTURES, DivergenceMeter
from blip2edge.calibration.search.variants import Variants, file_name
from blip2edge.calibration.targets import find_targets
from blip2edge.graph_files import load_graph
from blip2edge.runtime.backends.huge_pages import wait_for_huge_pages
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.bench.certificate.reference_outputs import default_prompt
from blip2edge.runtime.bench.measure import Bench
from blip2edge.runtime.bench.roofline import product_seconds
from blip2edge.runtime.captioning.assemble import text_parts
from blip2edge.runtime.captioning.captioner import STAGES, Captioner

ROUNDS = 3
"""Number of rounds; in each round, every bundle is loaded and timed once, in turn (A B C A B C ...)."""

RUNS = 4
"""Number of captions that are timed in each round, after a first caption that warms up; the least time counts."""

FASTER = 0.97
"""A format is proven faster if it takes less than this share of the original format's time."""

LAYER_NUMBER = re.compile(r"\.\d+\.")

StageMs = Mapping[str, float]


@dataclass(frozen=True)
class Workload:
    """The data that all measurements of a search share.

    Attributes:
        variants: Makes and stores the graphs in all formats.
        pictures: The pictures whose captions are compared.
        captions: Captions of these pictures by the original bundle.
        limit: Computes the loss of captions.
    """

    variants: Variants
    pictures: Sequence[CalibrationPicture]
    captions: Sequence[GreedyCaption]
    limit: DropLimit

    @property
    def journal(self) -> SearchJournal:
        """The stored results of the finished steps."""
        return self.variants.journal

    @property
    def context(self) -> CalibrationContext:
        """The original bundle, the recorded inputs and the options of the calibration."""
        return self.variants.context

    @property
    def tokens(self) -> int:
        """Length of the timed captions in tokens: the median length of the original bundle's captions."""
        return max(2, int(np.median([len(caption.tokens) for caption in self.captions])))

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt, without visual tokens."""
        prompts = text_parts(self.context.parent).prompts
        return max(prompts(default_prompt(prompts)).length - prompts.spec.visual_tokens, 0)

    @cached_property
    def references(self) -> list[list[str]]:
        """Reference captions of each picture; an empty list for a picture without any."""
        return [picture.references() for picture in self.pictures]

    @cached_property
    def meter(self) -> DivergenceMeter:
        """Measures the change of the next token; made at the first use, because making it runs the original graphs."""
        texts = [caption.tokens for caption in self.captions[:PICTURES]]
        return DivergenceMeter(self.context.parent, self.pictures[:PICTURES], texts, self.context.threads)


@dataclass
class StageTimer:
    """Measures the time of each stage of a caption for bundles in different formats, with their optimized copies.

    Times are CPU times of this process, on one thread.

    Attributes:
        work: The pictures, and the graphs in all formats.
        found: The least milliseconds of each stage. The keys are the part of the model that runs in the stage (such as
            the bridge) and the part's format.
    """

    work: Workload
    found: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def time(self, combinations: Sequence[Mapping[str, PartChoice]]) -> None:
        """Times the bundle of each combination of formats, in turn, and adds the results to :attr:`found`.

        Args:
            combinations: For each combination, the format of each part.
        """
        journal, report = self.work.journal, self.work.context.progress
        for number in range(ROUNDS):
            for at, choices in enumerate(combinations):
                report("time", number * len(combinations) + at, ROUNDS * len(combinations))
                name = file_name("+".join(str(choice.form) for choice in choices.values()))
                ms = journal.value(f"time-{number}-{name}", partial(self._timed, choices))
                for part, choice in choices.items():
                    self._add(part, str(choice.form), {stage: ms[stage] for stage in PART_STAGES[part]})
                self._add("", "", {"preprocess": ms["preprocess"]})

    def ms(self, part: str, form: GraphFormat | str) -> StageMs:
        """Returns the least milliseconds of the stages of a part (for example the bridge) in a format."""
        return self.found[part, str(form)]

    def _add(self, part: str, form: str, ms: StageMs) -> None:
        least = self.found.setdefault((part, form), dict(ms))
        for stage, value in ms.items():
            least[stage] = min(least[stage], value)

    def _timed(self, choices: Mapping[str, PartChoice]) -> StageMs:
        return measured_ms(self.work.variants.bundle(choices), self.work.pictures[0], self.work.tokens)


def measured_ms(bundle: Path, picture: CalibrationPicture, tokens: int) -> StageMs:
    """Loads a bundle as the runtime does, and measures the time of several captions of one picture.

    Args:
        bundle: The bundle.
        picture: The picture.
        tokens: Length of a caption in tokens; shortened if the model has too few positions.

    Returns:
        The least CPU milliseconds of each stage, on one thread.
    """
    with closing(Captioner.load(bundle, backend="cpu", threads=1)) as captioner:
        wait_for_huge_pages()
        bench = Bench(captioner, np.asarray(picture.image()))
        length = max(2, min(tokens, captioner.bundle.manifest.max_positions - bench.prompt_length()))
        bench.caption(length)
        clocks = [bench.caption(length) for _ in range(RUNS)]
    return {stage: min(clock.cpu_ms[stage] for clock in clocks) for stage in STAGES}


def part_nats(work: Workload, choices: Mapping[str, PartChoice]) -> float:
    """Measures how much the next token changes if parts of the model, such as the bridge, get other formats.

    Args:
        work: The pictures, and the graphs in all formats.
        choices: The format of each changed part; the other parts stay as in the original bundle.

    Returns:
        Kullback-Leibler divergence from the original model, in nats per token.
    """
    if all(choice.is_float for choice in choices.values()):
        return 0.0
    name = "nats-" + file_name("+".join(f"{part}={choice.form}" for part, choice in choices.items()))
    return float(work.journal.value(name, lambda: _nats(work, choices)))


def _nats(work: Workload, choices: Mapping[str, PartChoice]) -> float:
    variants = work.variants
    parts = {
        part: choices.get(part, PartChoice(part, GraphFormat(NumberFormat(FLOAT)))) for part in variants.parts.graphs
    }
    replaced = {
        graph: _session(variants, graph, choice.form)
        for part, choice in choices.items()
        if not choice.is_float
        for graph in variants.parts.graphs[part]
        if graph in variants.parts.running
    }
    try:
        return max(work.meter.loss(replaced, Bundle.open(variants.bundle(parts, copies=False))), 0.0)
    finally:
        for session in replaced.values():
            session.close()


def _session(variants: Variants, graph: str, form: GraphFormat) -> OnnxRuntimeSession:
    file = variants.context.parent.graph(graph).spec.file
    return OnnxRuntimeSession(variants.graph(graph, form) / file, variants.context.threads)


@dataclass(frozen=True)
class CaptionLoss:
    """How much the captions of a combination of formats differ from the captions of the original bundle.

    Attributes:
        drop: The loss in percentage points.
        same: Share of captions that are equal.
        cpu_s: CPU seconds to caption all pictures.
    """

    drop: float
    same: float
    cpu_s: float


def captions_lost(work: Workload, choices: Mapping[str, PartChoice]) -> CaptionLoss:
    """Generates captions with a combination of formats, and compares them with those of the original bundle."""
    name = "captions-" + file_name("+".join(str(choice.form) for choice in choices.values()))

    def compute() -> Mapping[str, float]:
        start = time.process_time()
        ours = caption_pictures(work.variants.bundle(choices), work.pictures, threads=work.context.threads)
        seconds = time.process_time() - start
        agreement = compare_captions(work.captions, ours)
        return vars(CaptionLoss(work.limit.drop(agreement, work.references), agreement.same, seconds))

    return CaptionLoss(**work.journal.value(name, compute))


def _product_seconds(size: tuple[int, int, int]) -> list[float]:
    """Measures a matrix multiplication of this size on the CPU; returns the seconds in floating point and in INT8."""
    return [product_seconds("cpu", *size, integer=integer) for integer in (False, True)]


def slower_kinds(context: CalibrationContext, graph: str, journal: SearchJournal) -> list[str]:
    """Finds the kinds of matrices of a graph for which an INT8 multiplication is not proven faster than floating point.

    A kind contains the matrices of the same name in all layers. The multiplication of each size is timed alone, with as
    many rows as in the graph.

    Returns:
        Name patterns of the matrices of the found kinds. The list is empty if no kind was found. It is also empty if
        all kinds were found, because then no matrix would become INT8.
    """
    model = load_graph(context.parent.file(context.parent.graph(graph).spec.file))
    sizes: dict[str, tuple[int, int, int]] = {}
    shapes = {node.name: node.inputs[0].shape for node in model.graph if node.inputs and node.inputs[0] is not None}
    for product in find_targets(model).products:
        shape = shapes[product.node]
        rows = int(np.prod([size for size in shape or () if isinstance(size, int)])) // product.inner
        kind = LAYER_NUMBER.sub(".*.", product.weight, count=1)
        sizes[kind] = (max(rows, 1), product.inner, product.outer)
    slower: dict[tuple[int, int, int], bool] = {}
    for size in sorted(set(sizes.values())):
        name = f"product-{'x'.join(map(str, size))}"
        seconds = journal.value(name, partial(_product_seconds, size))
        slower[size] = seconds[1] > FASTER * seconds[0]
    found = [kind for kind, size in sizes.items() if slower[size]]
    return found if len(found) < len(sizes) else []
