"""Plans the engines of a bundle: which graph TensorRT parses for each engine, and the engine's inputs and outputs.

A graph is loaded without its weights, adapted (``adapt.py``), checked against the TensorRT version (``support.py``),
and passed to the parser as bytes. The parser finds the weights by the graph's path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import Manifest
from blip2edge.bundle.schema import DECODER, CacheSpec, GraphSpec
from blip2edge.engine.adapt import adapt
from blip2edge.engine.decoder.cache_forms import FORMS, choose_form
from blip2edge.engine.decoder.constant_shape import CAPACITY
from blip2edge.engine.decoder.in_place import allow_decomposition
from blip2edge.engine.decoder.step_graph import StepSource, step_graph
from blip2edge.engine.operators import ParserVersion
from blip2edge.engine.profiles import PROMPT, with_rows
from blip2edge.engine.support import check_graph, refuse
from blip2edge.graph_files import load_graph
from blip2edge.runtime.backends.engine_files import CONSTANT, IN_PLACE, STEP

DEFAULT_CAPACITY = 256
"""Slots of the KV cache in addition to those of the prompt; fewer if the model's longest context is shorter."""

PROMPT_TEXT = 16  # text tokens around the picture in a usual prompt
PRODUCTS = ("MatMul", "Gemm", "Conv")
NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "INT4": "int4"}


@dataclass(frozen=True)
class EnginePlan:
    """Describes one engine to build and the graph for it, without weights, so that another process can build it.

    Attributes:
        name: Name of the graph, and of the engine's file.
        path: The ``.onnx`` file. The step graph (the graph that runs between two decode steps) has no file; its path
            only names the folder of its weights.
        spec: The engine's inputs and outputs.
        cache: The KV cache of a decoder; None for other graphs.
        form: Kind of that cache, one of ``DECODER_CACHES`` except ``auto``; empty for other graphs.
        reason: Why ``--decoder auto`` did not choose the cache that is updated in place; empty in all other cases.
        prompt: Usual number of tokens in a prefill.
        step: Token embedding table and tensors of the step graph; None for other graphs.
        precision: Precision of the bundle.
    """

    name: str
    path: Path
    spec: GraphSpec
    cache: CacheSpec | None = None
    form: str = ""
    reason: str = ""
    prompt: int = PROMPT
    step: StepSource | None = None
    precision: str = "fp32"

    def model(self) -> ir.Model:
        """Loads the graph and adapts it for TensorRT; its weights stay on disk."""
        if self.step is not None:
            return step_graph(self.step)
        model = load_graph(self.path)
        if self.cache is not None and self.form in FORMS:
            FORMS[self.form].rewrite(model, self.cache, self.spec.axes()[CAPACITY].max, self.path.name)
        adapt(model)
        return model

    def serialised(self, version: ParserVersion) -> tuple[bytes, dict[str, int]]:
        """Converts the adapted graph to bytes, without its weights.

        Returns:
            The bytes, and the number of matrix multiplications and convolutions by precision.

        Raises:
            EngineError: The TensorRT version ``version`` does not support a node.
        """
        model = self.model()
        refuse(self.path.name, check_graph(model, version), version)
        allow_decomposition(model)
        return ir.to_proto(model).SerializeToString(), asked_precisions(model)


def capacity_of(manifest: Manifest, wanted: int | None) -> int:
    """Returns the number of slots of each row in the decoder's KV cache.

    The number is never larger than the model's longest context.

    Args:
        manifest: The bundle's manifest.
        wanted: The value of ``--capacity``; None for :data:`DEFAULT_CAPACITY` more slots than the prompt usually needs.
    """
    return min(manifest.max_positions, DEFAULT_CAPACITY + prompt_of(manifest) if wanted is None else wanted)


def prompt_of(manifest: Manifest) -> int:
    """Estimates the number of tokens in the decoder's prompt: :data:`PROMPT_TEXT` text tokens and the visual tokens.

    Visual tokens are not counted if the decoder attends to them by cross-attention. For a bundle without a prompt, the
    result is :data:`PROMPT`.
    """
    if manifest.prompt is None:
        return PROMPT
    inside = manifest.cross is None
    return PROMPT_TEXT + (manifest.prompt.visual_tokens if inside else 0)


def plans_of(
    bundle: Bundle,
    version: ParserVersion,
    *,
    capacity: int | None = None,
    most_rows: int | None = None,
    decoder: str = CONSTANT,
) -> list[EnginePlan]:
    """Returns the plan of each engine of a bundle, in the order in which the engines run.

    Args:
        bundle: An opened bundle.
        version: The TensorRT version that will parse the graphs.
        capacity: Slots of the KV cache; None for the default.
        most_rows: Largest number of rows (pictures times beams) of the decoder; None for the value of the export.
        decoder: Kind of the decoder's KV cache, one of ``DECODER_CACHES``.

    Raises:
        EngineError: ``decoder`` is ``in-place``, but this TensorRT version or this graph does not allow it.
    """
    manifest = bundle.manifest
    plans: list[EnginePlan] = []
    step: StepSource | None = None
    for name, record in manifest.graphs.items():
        plan = EnginePlan(name, bundle.file(record.spec.file), record.spec, precision=manifest.precision)
        if name == DECODER and manifest.cache is not None:
            form, reason = choose_form(decoder, plan.path, manifest.cache, version)
            spec = with_rows(record.spec, most_rows)
            if form in FORMS:
                spec = FORMS[form].describe(spec, manifest.cache, capacity_of(manifest, capacity))
                step = StepSource.of(bundle, most_rows, per_row=form == IN_PLACE)
            plan = replace(plan, spec=spec, prompt=prompt_of(manifest), cache=manifest.cache, form=form, reason=reason)
        plans.append(plan)
    if step is not None:
        file = bundle.path / f"{STEP}.onnx"
        plans.append(EnginePlan(STEP, file, step.spec, step=step, precision=manifest.precision))
    return plans


def asked_precisions(model: ir.Model) -> dict[str, int]:
    """Counts the matrix multiplications and convolutions of a graph by precision, the most frequent first.

    ``int8`` and ``int4`` mean that both inputs are quantised; ``int8 weights`` and ``int4 weights`` mean that only the
    weights are.
    """
    found: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type in PRODUCTS and len(node.inputs) > 1:
            first, second = (_stored(value) for value in node.inputs[:2])
            if first == second and first in ("int8", "int4"):
                found[first] += 1
            elif second in ("int8", "int4"):
                found[f"{second} weights"] += 1
            else:
                value = node.inputs[0]
                kind = "" if value is None or value.dtype is None else value.dtype.name
                found[NAMES.get(kind, kind.lower() or "float")] += 1
    return dict(found.most_common())


def _stored(value: ir.Value | None) -> str:
    """Returns the dtype in which a quantised matrix is stored (the input of DequantizeLinear), such as ``int8``.

    Returns an empty text if the matrix is not quantised.
    """
    while value is not None and value.producer() is not None:
        node = value.producer()
        if node is None:
            return ""
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0]
            dtype = None if source is None else source.dtype
            if dtype is None and source is not None and source.const_value is not None:
                dtype = source.const_value.dtype
            return NAMES.get(dtype.name, "") if dtype is not None else "int8"
        if node.op_type not in ("Cast", "Transpose", "Reshape", "Mul", "Unsqueeze", "Squeeze"):
            return ""
        value = node.inputs[0]
    return ""


def weight_bytes(plan: EnginePlan, files: Mapping[str, int]) -> int:
    """Returns the size in bytes of the weights for one engine.

    Args:
        plan: The engine's plan.
        files: Sizes of the bundle's files in bytes, by name.
    """
    if plan.step is not None:
        return plan.step.table_bytes
    return sum(size for name, size in files.items() if name.startswith(plan.path.name))
