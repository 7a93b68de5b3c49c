"""Runs the graphs that TensorRT gets, node by node in torch on the CPU, with every value in its declared type.

ONNX Runtime's CPU provider computes an fp16 graph in FP32 and rounds where it must, so an overflow between two nodes
does not show. Here the result of each node is rounded to its type: a product beyond 65504 is infinite in fp16, as in a
strongly typed engine. Types are inferred from the inputs, as TensorRT does; a node that mixes two floating types, or
whose declared type is another one, is an error.

    python -m tests.engine.typed_interpreter BUNDLE

prints for each engine of a bundle the largest difference to the same graph with all floats in FP32 in ONNX Runtime,
whether all values are finite, and the largest value of an fp16 node.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import DECODER, CacheSpec, GraphSpec
from blip2edge.engine.decoder.step_graph import dense_table
from blip2edge.engine.prepare import EnginePlan
from blip2edge.export.verify import SEED, cases_of, random_inputs
from blip2edge.model.layers import MASKED
from blip2edge.runtime.decoding.kv.fixed import CACHE_POSITION
from tests.engine.rtx import plans
from tests.engine.typed_operators import DTYPES, OPERATORS, Call, quantized_type, tensor_of

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOATING = (ir.DataType.FLOAT, *HALF)
CONVERTING = ("Cast", "QuantizeLinear", "DequantizeLinear")
BOOLEAN = ("And", "Or", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")

Observe = Callable[[ir.Node, Tensor], None]
"""Called with each node and each of its outputs."""


class TypedGraphError(Exception):
    """A node that no strongly typed network can hold: an unknown operator, or types that do not fit together."""


def run(
    model: ir.Model, inputs: Mapping[str, Array], observe: Observe | None = None, half_sums: bool = False
) -> dict[str, Tensor]:
    """Runs a graph with every value in its declared type.

    Args:
        model: The graph, as :meth:`EnginePlan.model` gives it.
        inputs: Arrays by name; floating ones are rounded to the type of the graph's input.
        observe: Called with each node and each of its outputs.
        half_sums: Whether products of fp16 matrices are summed in fp16, as some of TensorRT's kernels do.

    Returns:
        The outputs by name, in their declared types.

    Raises:
        TypedGraphError: An operator is unknown, a node mixes two floating types, or an output is declared with another
            type than the node gives.
    """
    values: dict[ir.Value, tuple[Tensor, ir.DataType]] = {}
    for value in model.graph.inputs:
        values[value] = _given(value, inputs[str(value.name)])
    kept = set(model.graph.outputs)
    left = {value: len(value.uses()) for node in model.graph for value in node.outputs if value not in kept}
    with torch.no_grad():
        for node in model.graph:
            results = _results(node, [_read(value, values) for value in node.inputs], half_sums)
            for output, (result, kind) in zip(node.outputs, results, strict=False):
                values[output] = result, kind
                if observe is not None:
                    observe(node, result)
            for source in node.inputs:
                if source in left:
                    left[source] -= 1
                    if not left[source]:
                        values.pop(source, None)
    return {str(value.name): _read(value, values)[0] for value in model.graph.outputs}


def _given(value: ir.Value, array: Array) -> tuple[Tensor, ir.DataType]:
    """An input in its declared type."""
    kind = ir.DataType.FLOAT if value.dtype is None else value.dtype
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if kind not in FLOATING and tensor.dtype != DTYPES[kind]:
        raise TypedGraphError(f"the input {value.name} is {kind.name}, got {tensor.dtype}")
    return tensor.to(DTYPES[kind]), kind


def _read(value: ir.Value | None, values: Mapping[ir.Value, tuple[Tensor, ir.DataType]]) -> Any:
    """A value with its type; weights are read from their file at each use. None twice for an input left out."""
    if value is None:
        return None, None
    if value.const_value is not None and value not in values:
        return tensor_of(value.const_value), value.const_value.dtype
    return values[value]


def _results(
    node: ir.Node, read: Sequence[tuple[Tensor | None, ir.DataType | None]], half_sums: bool
) -> Iterator[tuple[Tensor, ir.DataType]]:
    """The outputs of a node, rounded to their types."""
    name = f"{node.name or node.outputs[0].name} ({node.op_type})"
    types = [kind for _, kind in read]
    floats = {kind.name for kind in types if kind in FLOATING and kind is not None}
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        raise TypedGraphError(f"{name}: the operator {node.domain or 'ai.onnx'}::{node.op_type} is unknown")
    if len(floats) > 1:
        raise TypedGraphError(f"{name}: its inputs are {' and '.join(sorted(floats))}; one type is needed")
    given = [value.float() if kind in HALF and value is not None else value for value, kind in read]
    call = Call(node, given, types, half_sums)
    found = OPERATORS[node.op_type](call)
    for index, result in enumerate([found] if isinstance(found, Tensor) else found):
        if index == len(node.outputs):
            return
        kind, declared = _kind(call, index), node.outputs[index].dtype
        if declared not in (None, kind):
            raise TypedGraphError(f"{name}: its output is declared as {declared}, but is {kind}")
        if result.dtype != DTYPES[kind] and not (node.op_type in CONVERTING or kind in HALF):
            raise TypedGraphError(f"{name}: its output is {kind.name}, but its inputs give {result.dtype}")
        yield result.to(DTYPES[kind]), kind


def _kind(call: Call, index: int) -> ir.DataType:
    """The type of a node's output by its operator, from the types of its inputs."""
    node = call.node
    if node.op_type == "Cast":
        return ir.DataType(call.attribute("to"))
    if node.op_type == "QuantizeLinear":
        return quantized_type(call)
    if node.op_type in BOOLEAN:
        return ir.DataType.BOOL
    if node.op_type in ("Shape", "ArgMax") or (node.op_type == "TopK" and index == 1):
        return ir.DataType.INT64
    if node.op_type in ("Constant", "ConstantOfShape"):
        value = call.attribute("value")
        if value is not None:
            return ir.DataType(value.dtype)
        return ir.DataType.INT64 if {"value_int", "value_ints"} & set(node.attributes) else ir.DataType.FLOAT
    kind = call.types[1 if node.op_type in ("DequantizeLinear", "Where") else 0]
    if kind is None:
        raise TypedGraphError(f"{node.op_type} needs its first inputs")
    return kind


def in_fp32(model: ir.Model) -> ir.Model:
    """Turns every fp16 and bf16 value of a graph into FP32, in place; weights keep their rounded values."""
    for node in model.graph:
        to, value = node.attributes.get("to"), node.attributes.get("value")
        if node.op_type == "Cast" and to is not None and to.as_int() in HALF:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        if value is not None and value.as_tensor().dtype in HALF:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.as_tensor().numpy().astype(np.float32)))
    inner = [output for node in model.graph for output in node.outputs]
    for item in [*model.graph.inputs, *model.graph.initializers.values(), *inner]:
        stored = item.const_value
        if stored is not None and stored.dtype in HALF:
            item.const_value = ir.tensor(stored.numpy().astype(np.float32), name=item.name)
        if item.dtype in HALF:
            item.dtype = ir.DataType.FLOAT
    return model


def in_onnxruntime(model: ir.Model, cases: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Runs a graph in ONNX Runtime's CPU provider, node by node as it is written: nothing is fused."""
    import onnxruntime  # after blip2edge, which switches its telemetry off

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "graph.onnx"
        ir.save(model, path, external_data="graph.data")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 3  # TensorScatter warns of its copies
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kinds = {value.name: value.type for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        answers = []
        for case in cases:
            feed = {name: case[name].astype(np.float16) if "16" in kind else case[name] for name, kind in kinds.items()}
            answers.append(dict(zip(names, session.run(names, feed), strict=True)))
    return answers


def cases_of_plan(bundle: Bundle, plan: EnginePlan) -> list[dict[str, Array]]:
    """Random inputs of an engine, floating ones in float32: those of the export's check, in the engine's form."""
    if plan.step is not None:
        return [_step_case(plan.spec, rows, np.random.default_rng([SEED, rows])) for rows in (1, 3)]
    spec = bundle.graph(plan.name).spec
    drawn = [random_inputs(spec, sizes, np.random.default_rng([SEED, at])) for at, sizes in enumerate(cases_of(spec))]
    cache = bundle.manifest.cache if has_capacity(plan) else None
    return drawn if cache is None else [_constant_case(case, cache, plan.spec) for case in drawn]


def has_capacity(plan: EnginePlan) -> bool:
    """Whether an engine is a decoder whose cache has a capacity, not one that grows."""
    return plan.name == DECODER and CACHE_POSITION in [tensor.name for tensor in plan.spec.inputs]


def _step_case(spec: GraphSpec, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Logits, positions, penalties above 1, and marks of 0 and 1."""
    found: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tensor.shape({"batch": rows})
        if tensor.dtype == "int64":
            found[tensor.name] = rng.integers(0, 3, shape)
        elif tensor.name in ("seen", "held"):
            found[tensor.name] = rng.integers(0, 2, shape).astype(np.float32)
        else:
            drawn = rng.standard_normal(shape, dtype=np.float32)
            found[tensor.name] = 1 + np.abs(drawn) if tensor.name == "penalty" else drawn
    return found


def _constant_case(case: Mapping[str, Array], cache: CacheSpec, spec: GraphSpec) -> dict[str, Array]:
    """The inputs of a growing decoder for the form with a constant capacity: unused slots are zero and masked."""
    found = {tensor.name: case[tensor.name] for tensor in spec.inputs if tensor.name in case}
    capacity = spec.axes()["capacity"].max
    rows, _, past, _ = case[cache.past_names()[0]].shape
    position = next(tensor for tensor in spec.inputs if tensor.name == CACHE_POSITION)
    found[CACHE_POSITION] = np.full(position.shape({"batch": rows}), past, np.int64)
    for name, axis in (("attention_mask", 1), *((name, 2) for name in cache.past_names())):
        pad = [(0, 0)] * case[name].ndim
        pad[axis] = (0, capacity - case[name].shape[axis])
        found[name] = np.pad(case[name], pad)
    return found


def with_dense_table(plan: EnginePlan, directory: Path) -> EnginePlan:
    """The plan whose step graph reads a table in floating point, as ``build`` makes it."""
    if plan.step is None:
        return plan
    table = dense_table(plan.step.table, plan.step.spec.outputs[1].dtype, directory / "table.safetensors")
    return replace(plan, step=replace(plan.step, table=table))


@dataclass(frozen=True)
class Comparison:
    """A typed run compared with references.

    Attributes:
        differences: Largest difference of each output, as a share of the reference's largest value; infinite where the
            output is not finite.
        finite: Whether every value of every node is finite.
        peak: Largest absolute value of a node in fp16, and that node; scores of masked slots are left out. 0 where no
            node is in fp16.
    """

    differences: Mapping[str, float]
    finite: bool
    peak: tuple[float, str]

    @property
    def largest(self) -> float:
        """The largest difference of all outputs."""
        return max(self.differences.values())


def compare(
    model: ir.Model,
    cases: Sequence[Mapping[str, Array]],
    references: Sequence[Mapping[str, Array]],
    half_sums: bool = False,
) -> Comparison:
    """Runs a graph typed on every case and compares its outputs with the references."""
    finite, peak = True, (0.0, "")
    differences: dict[str, float] = {}

    def observe(node: ir.Node, value: Tensor) -> None:
        nonlocal finite, peak
        if value.is_floating_point() and value.numel():
            finite = finite and bool(value.isfinite().all())
            if value.dtype == torch.float16:
                largest = float(value.where(value > MASKED / 2, 0).abs().max())
                peak = max(peak, (largest, str(node.name or node.outputs[0].name)))

    for case, reference in zip(cases, references, strict=True):
        for name, value in run(model, case, observe, half_sums).items():
            differences[name] = max(differences.get(name, 0.0), difference(value, reference[name]))
    return Comparison(differences, finite, peak)


def difference(value: Tensor, reference: Array) -> float:
    """Largest difference as a share of the reference's largest value; infinite where one is not finite."""
    expected = torch.from_numpy(np.asarray(reference, np.float64))
    if not value.isfinite().all():
        return float("inf")
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return float((value.double() - expected).abs().max()) / max(largest, 1e-12) if expected.numel() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="typed run of every engine graph of a bundle, on random inputs")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--half-sums", action="store_true", help="sum products of fp16 matrices in fp16, not in FP32")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    print(f"{'graph':<16}{'precision':<14}{'nodes':>6}{'difference':>12}  {'finite':<8}largest fp16 value")
    for planned in plans(bundle):
        with tempfile.TemporaryDirectory() as directory:
            plan = with_dense_table(planned, Path(directory))
            cases = cases_of_plan(bundle, plan)
            references = in_onnxruntime(in_fp32(plan.model()), cases)
            found = compare(plan.model(), cases, references, options.half_sums)
            nodes = sum(1 for _ in plan.model().graph)
        precision = bundle.graph(plan.name if plan.step is None else DECODER).precision
        finite, peak = "yes" if found.finite else "NO", f"{found.peak[0]:.4g} {found.peak[1]}"
        name = f"{DECODER} (grows)" if plan.name == DECODER and not has_capacity(plan) else plan.name
        print(f"{name:<16}{precision:<14}{nodes:>6}{found.largest:>12.1e}  {finite:<8}{peak}")


if __name__ == "__main__":
    main()
