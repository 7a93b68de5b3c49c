"""Compares a bundle's outputs on this machine and backend with the reference outputs in the bundle (`certify`).

Each graph gets its own seeded inputs, not the outputs of other graphs. So a deviation shows which graph is wrong, and
which of its outputs is the first wrong one. Then generated test pictures are captioned: this shows whether the
deviations change texts, and how fast each stage is.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import BackendName
from blip2edge.errors import BundleError, UsageError, option
from blip2edge.packages import installed
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.open_graph import choose_backend
from blip2edge.runtime.backends.probe import exact_processor
from blip2edge.runtime.bench.certificate.reference_outputs import (
    ReferenceOutputs,
    caption_drawings,
    deviation,
    run_graphs,
    sketch,
)
from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult
from blip2edge.version import __version__

TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1}
"""Largest deviation ``|a - b| / |b|`` of an output that passes, by the precision of the graph."""

INTEGER_TOLERANCE = 0.15
"""Largest allowed deviation for graphs with integer weights or activations, because kernels round differently.

A deviation of 0.15 corresponds to a cosine of about 0.99.
"""

EXACT, OTHERS = 1.0, 0.9
"""Defaults of the smallest share of equal tokens that passes: for a bundle in fp32, and for any other bundle."""

PACKAGES = ("numpy", "onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True)
class OutputCheck:
    """The deviation of one output of a graph from its reference.

    Attributes:
        output: Name of the output; ``logits of ...`` for the logits of a decoder in one kind of step of a generation.
        deviation: Estimate of ``|a - b| / |b|``; infinite if a value is not finite.
        tolerance: Largest deviation that passes.
    """

    output: str
    deviation: float
    tolerance: float

    @property
    def held(self) -> bool:
        """Returns whether the deviation is at most the tolerance."""
        return self.deviation <= self.tolerance


@dataclass(frozen=True)
class GraphCheck:
    """The result of comparing the outputs of one graph.

    Attributes:
        graph: Name of the graph.
        outputs: Outputs of the graph that were compared, in the order in which the graph computes them.
        not_compared: Recorded outputs that the backend does not return, such as a KV cache that it keeps itself.
    """

    graph: str
    outputs: Sequence[OutputCheck]
    not_compared: Sequence[str] = ()

    @property
    def worst(self) -> OutputCheck:
        """Returns the output with the largest deviation."""
        return max(self.outputs, key=lambda one: one.deviation)

    @property
    def first_beyond(self) -> str | None:
        """Returns the first output whose deviation exceeds its tolerance; None if all outputs pass."""
        return next((one.output for one in self.outputs if not one.held), None)


@dataclass(frozen=True)
class Certificate:
    """The result of :func:`certify` for a bundle on this machine; ``--json`` prints :meth:`to_json`.

    Attributes:
        bundle: The bundle's directory.
        sha256: Hash of the bundle.
        backend: The backend that ran the graphs.
        machine: Processor, system and package versions of this machine; under ``references``, those of the machine that
            recorded the references.
        graphs: The compared outputs of each graph.
        captions: Number of captions with the same tokens as the reference, and number of all captions.
        tokens: Number of tokens that equal the reference at the same position, and number of all reference tokens.
        min_equal: Smallest share of equal tokens that passes.
        timings_ms: Median milliseconds by stage.
    """

    bundle: str
    sha256: str
    backend: str
    machine: Mapping[str, Any]
    graphs: Sequence[GraphCheck]
    captions: tuple[int, int]
    tokens: tuple[int, int]
    min_equal: float
    timings_ms: Mapping[str, float]

    @property
    def faults(self) -> list[str]:
        """Returns a sentence for each failed check; empty if all checks passed."""
        found = [
            f"{one.graph}: {one.first_beyond} is the first output beyond its tolerance; the largest deviation is "
            f"{one.worst.deviation:.1e} ({one.worst.output}), and {one.worst.tolerance:.0e} is allowed"
            for one in self.graphs
            if one.first_beyond is not None
        ]
        equal, count = self.tokens
        if equal < self.min_equal * count:
            found.append(f"{equal} of {count} tokens are equal, and {self.min_equal:.1%} are required")
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object with the attributes as keys, and with ``held`` and ``faults``."""
        values = asdict(self)
        for graph, check in zip(values["graphs"], self.graphs, strict=True):
            graph["first_beyond"] = check.first_beyond
        for name in ("captions", "tokens"):
            values[name] = dict(zip(("equal", "all"), values[name], strict=True))
        return {**values, "held": not self.faults, "faults": self.faults}


def certify(
    bundle: str | Path | Bundle,
    *,
    backend: BackendName = "auto",
    threads: int | None = None,
    min_equal: float | None = None,
    tolerance: float | None = None,
    require_signature: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Certificate:
    """Runs a bundle's graphs and captions here, and compares them with the references in the bundle.

    Args:
        bundle: The bundle.
        backend: The backend to test; ``auto`` for the backend that `caption` would use.
        threads: CPU threads of an operator; None for all cores.
        min_equal: Smallest share of equal tokens, 0 to 1; None for 1 in fp32 and 0.9 otherwise.
        tolerance: Largest deviation of every output; None for :data:`TOLERANCES` by precision.
        require_signature: A public key; the bundle must have a signature that fits this key. If None, the bundle needs
            no signature.
        progress: Called with a stage's name, steps done and steps in all.

    Raises:
        BundleError: The bundle has no reference outputs, or cannot be opened.
        BackendError: The backend does not run here.
        UsageError: A limit is outside its range.
    """
    for name, value in (("min_equal", min_equal), ("tolerance", tolerance)):
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"expected {option(name)} from 0 to 1, got {value}")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, require_signature=require_signature)
    references = ReferenceOutputs.read(opened)
    if references is None:
        raise BundleError(
            f"{opened.path} has no reference outputs (reference_outputs.json): export records them for models whose "
            "checkpoint has at most 1 GiB, in fp32 and fp16",
            f"export the checkpoint again with this version, with {option('verify')} full if it is larger",
        )
    chosen, engines = choose_backend(opened, backend)
    if engines is not None:
        engines.close()
    graphs = _graph_checks(opened, references, chosen, threads, tolerance, progress)
    results: list[CaptionResult] = []
    if references.tokens:
        with Captioner(opened, chosen, threads, "none") as captioner:  # type: ignore[arg-type]
            results = caption_drawings(captioner, references.prompt)
    pairs = list(zip(references.tokens, [one.tokens for one in results], strict=True))
    equal = sum(one == other for wanted, got in pairs for one, other in zip(wanted, got, strict=False))
    exact = all(graph.precision == "fp32" for graph in opened.manifest.graphs.values())
    return Certificate(
        bundle=str(opened.path),
        sha256=opened.sha256,
        backend=chosen,
        machine=_machine(references),
        graphs=graphs,
        captions=(sum(wanted == got for wanted, got in pairs), len(pairs)),
        tokens=(equal, sum(len(wanted) for wanted, _ in pairs)),
        min_equal=min_equal if min_equal is not None else EXACT if exact else OTHERS,
        timings_ms=_medians(results),
    )


def _graph_checks(
    bundle: Bundle,
    references: ReferenceOutputs,
    backend: str,
    threads: int | None,
    tolerance: float | None,
    progress: ProgressCallback | None,
) -> list[GraphCheck]:
    checks = []
    for name, drawn, made in run_graphs(bundle, backend, threads, progress=progress):
        for key, array in drawn.items():
            wanted = references.inputs.get(f"{name}/{key}")
            if wanted is None or deviation(sketch(array), wanted) > 1e-5:
                raise BundleError(
                    f"{bundle.path}: expected the random inputs of {name} from which the reference outputs were made "
                    f"(NumPy {references.made_with.get('numpy', 'unknown')}), got others (NumPy {np.__version__})",
                    "install that version of NumPy",
                )
        precision = bundle.graph(name).precision
        allowed = tolerance if tolerance is not None else TOLERANCES.get(precision, INTEGER_TOLERANCE)
        recorded = {
            key.removeprefix(f"{name}/"): value
            for key, value in references.outputs.items()
            if key.startswith(f"{name}/")
        }
        found = [
            OutputCheck(key, deviation(sketch(array), recorded[key]), allowed)
            for key, array in made.items()
            if key in recorded
        ]
        if not found:
            raise BundleError(f"{bundle.path} has no reference outputs of the graph {name}", "copy the bundle again")
        checks.append(GraphCheck(name, found, tuple(key for key in recorded if key not in made)))
    return checks


def _medians(results: Sequence[CaptionResult]) -> dict[str, float]:
    stages = results[0].timings_ms if results else {}
    return {stage: round(float(np.median([one.timings_ms[stage] for one in results])), 3) for stage in stages}


def _machine(references: ReferenceOutputs) -> dict[str, Any]:
    versions = {name: found for name in PACKAGES if (found := installed(name))}
    return {
        "processor": exact_processor(),
        "system": platform.platform(),
        "versions": {"blip2edge": __version__, **versions},
        "references": dict(references.made_with),
    }
