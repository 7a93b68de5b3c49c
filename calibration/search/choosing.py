"""``--drop-limit``: the layers that suffer most stay as they are, until few enough captions change.

1. Everything is quantised, and every layer's sensitivity is measured (``sensitivity.py``).
2. As long as more of the calibration's captions differ from the parent's than the limit allows (or CIDEr against the
   pictures' references falls by more), the worst layers are left in the parent's precision: one, two, four, … of them.
3. Between the last number that was too few and the first that was enough, the least that is enough is searched.

With every layer left, the bundle says what its parent says.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from blip2edge.bundle.schema import EMBEDDINGS_FILE
from blip2edge.calibration.activations.qdq import Plan
from blip2edge.calibration.activations.quantise import Job, write_planned
from blip2edge.calibration.pictures import Picture
from blip2edge.calibration.results import Made
from blip2edge.calibration.search.agreement import Captions
from blip2edge.calibration.search.sensitivity import (
    PICTURES,
    Layer,
    Sensitivity,
    Yardstick,
    layers_of,
    only,
    rank,
    with_activations,
    with_blocks,
)
from blip2edge.calibration.targets import find_targets
from blip2edge.calibration.weights.language_weights import rewrite_weights
from blip2edge.errors import UsageError, option

Score = Callable[[Sequence[str], Sequence[Sequence[str]]], float]
"""What captions are worth against each picture's references; CIDEr, where 1 is 100 points."""


@dataclass(frozen=True)
class DropLimit:
    """How much may be lost.

    Attributes:
        points: At most so many percent points.
        cider: Of captions against references; None where there are no references.
    """

    points: float
    cider: Score | None = None

    @property
    def measure(self) -> str:
        """What is counted: ``cider`` that is lost, or ``captions`` that differ."""
        return "captions" if self.cider is None else "cider"

    def drop(self, captions: Captions, references: Sequence[Sequence[str]]) -> float:
        """What is lost of a bundle's captions, in percent points."""
        if self.cider is None:
            return 100.0 * (1.0 - captions.same)
        return 100.0 * (self.cider(captions.parent, references) - self.cider(captions.ours, references))


@dataclass
class Choice:
    """What was left, and what it brought.

    Attributes:
        limit: What may be lost.
        ranking: Every layer's sensitivity, the worst first.
        drops: Percent points that are lost, by the number of layers that were left.
        left: How many of the ranking were left in the end.
    """

    limit: DropLimit
    ranking: Sequence[Sensitivity]
    drops: dict[int, float] = field(default_factory=dict)
    left: int = 0

    def to_json(self) -> dict[str, Any]:
        """The record's ``sensitivity`` object."""
        return {
            "limit": self.limit.points,
            "measure": self.limit.measure,
            "drop_with_all_quantised": self.drops[0],
            "drop": self.drops[self.left],
            "tried": {str(left): drop for left, drop in sorted(self.drops.items())},
            "left": [item.to_json() for item in self.ranking[: self.left]],
            "layers": [item.to_json() for item in self.ranking],
        }


@dataclass(frozen=True)
class Candidates:
    """Layers that can be left, and how.

    Attributes:
        made: The graphs as they were quantised, by name.
        plans: Of those whose activations became INT8.
        whole: A directory with a copy of the files of those whose weights alone are integers, and of the token table.
    """

    made: Mapping[str, Made]
    plans: Mapping[str, Plan]
    whole: Path

    @classmethod
    def keep(cls, job: Job, made: Mapping[str, Made], whole: Path) -> Candidates:
        """Copies what was quantised, before graphs are written again.

        Args:
            job: The calibration.
            made: The graphs.
            whole: An empty directory.
        """
        whole.mkdir()
        for item in made.values():
            if item.summary.matrices:
                for file in item.record.files:
                    shutil.copyfile(job.staging / file, whole / file)
        if (job.staging / EMBEDDINGS_FILE).is_file():
            shutil.copyfile(job.staging / EMBEDDINGS_FILE, whole / EMBEDDINGS_FILE)
        return cls(made, {name: item.plan for name, item in made.items() if item.plan is not None}, whole)

    def layers(self) -> list[Layer]:
        """All of them, in the order of the graphs."""
        found = []
        for name, made in self.made.items():
            plan = self.plans.get(name)
            if plan is not None:
                found += layers_of(name, [p.weight for group in plan.groups for p in group.products])
            else:
                found += layers_of(name, list(made.summary.matrices))
        return found


def check_drop_limit(limit: float | None, captions: bool) -> None:
    """Raises UsageError unless a limit is None, or from 0 to 100 on a model that captions."""
    if limit is None:
        return
    if not 0 <= limit <= 100:
        raise UsageError(f"{option('drop_limit')} is from 0 to 100 percent points, not {limit:g}")
    if not captions:
        raise UsageError(
            f"{option('drop_limit')} compares captions, and this model writes none",
            f"leave {option('drop_limit')} out",
        )


def measure_layers(
    job: Job, candidates: Candidates, pictures: Sequence[Picture], texts: Sequence[Sequence[int]]
) -> list[Sensitivity]:
    """Every layer's sensitivity, the worst first."""
    yardstick = Yardstick(job.parent, pictures[:PICTURES], texts[:PICTURES], job.threads)

    def model_of(layer: Layer) -> Callable[[], ir.Model]:
        source = job.parent.file(job.parent.graph(layer.graph).spec.file)
        plan = candidates.plans.get(layer.graph)
        if plan is not None:
            return partial(with_activations, source, plan, layer)
        return partial(with_blocks, source, candidates.whole / source.name, layer)

    models = [(layer, model_of(layer)) for layer in candidates.layers()]
    return rank(yardstick, models, partial(job.report, "sensitivity"))


def choose(
    job: Job,
    candidates: Candidates,
    ranking: Sequence[Sensitivity],
    limit: DropLimit,
    drop_of: Callable[[Mapping[str, Made]], float],
) -> tuple[dict[str, Made], Choice]:
    """Leaves the least number of the worst layers with which the limit holds.

    Args:
        job: The calibration; its staging directory holds the graphs, quantised.
        candidates: What was quantised.
        ranking: The worst first.
        limit: What may be lost.
        drop_of: Seals the staging directory and gives the percent points that are lost.

    Returns:
        The graphs as they are in the end, and the record.
    """
    choice = Choice(limit, ranking)
    made = dict(candidates.made)
    written = 0

    def try_with(left: int) -> bool:
        nonlocal made, written
        if left or written:  # at first all is written as it is with none left
            made = _rewritten(job, candidates, ranking[:left])
        written = left
        choice.drops[left] = drop_of(made)
        return choice.drops[left] <= limit.points

    enough = 0 if try_with(0) else None
    low, tried = 0, 1
    while enough is None:
        if try_with(tried) or tried == len(ranking):
            enough = tried
        else:
            low, tried = tried, min(2 * tried, len(ranking))
    while enough - low > 1:
        middle = (low + enough) // 2
        if try_with(middle):
            enough = middle
        else:
            low = middle
    if written != enough:
        try_with(enough)
    choice.left = enough
    return made, choice


def _rewritten(job: Job, candidates: Candidates, worst: Sequence[Sensitivity]) -> dict[str, Made]:
    """The graphs with some layers left as in the parent; with all of them, the token table is the parent's too."""
    table = candidates.whole / EMBEDDINGS_FILE
    if table.is_file():
        everything = len(worst) == len(candidates.layers())
        source = job.parent.file(EMBEDDINGS_FILE) if everything else table
        shutil.copyfile(source, job.staging / EMBEDDINGS_FILE)
    out = {}
    for name, made in candidates.made.items():
        left = {
            weight: f"left by --drop-limit: it alone changes the next token by {item.loss:.2g} nats"
            for item in worst
            if item.layer.graph == name
            for weight in item.layer.weights
        }
        plan = candidates.plans.get(name)
        if plan is None and not made.summary.matrices:
            out[name] = made
            continue
        again = (
            rewrite_weights(job, made, candidates.whole, left)
            if plan is None
            else _with_plan(job, made, plan, left)
        )
        if not again.summary.products:
            precision = job.parent.graph(name).precision
            again = replace(
                again,
                record=replace(again.record, precision=precision),
                summary=replace(again.summary, precision=precision),
            )
        out[name] = replace(again, headroom=made.headroom)
    return out


def _with_plan(job: Job, made: Made, plan: Plan, left: Mapping[str, str]) -> Made:
    name = made.record.spec.name
    record = job.parent.graph(name)
    model = ir.load(job.parent.file(record.spec.file))
    weights = [p.weight for group in plan.groups for p in group.products if p.weight not in left]
    part = only(plan, weights)
    part.left = {**plan.left, **left}
    details = [detail for detail in made.details if set(detail["products"]) & set(weights)]
    return replace(write_planned(job, record, model, find_targets(model), part), details=details, plan=part)
