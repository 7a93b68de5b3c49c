"""Checks parity: runs exported graphs in the runtime and compares them with torch on the same random inputs."""

from __future__ import annotations

import copy
import ctypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blip2edge.bundle.schema import QUERIES, QUERY_IDS, VISION, GraphSpec, Parity, TensorSpec
from blip2edge.errors import ParityError, option
from blip2edge.export import merging
from blip2edge.export.graphs import GRAPHS
from blip2edge.export.precision import convert, exceptions_of
from blip2edge.export.to_onnx import Traced, trace
from blip2edge.export.weights import Weights, point_at, write_weights
from blip2edge.model.models import Config, Model, build_model
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession

Array = NDArray[Any]

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-1, "bf16": 3e-1}
"""Largest allowed difference by precision: absolute difference divided by the output's largest absolute value."""

CASES: tuple[dict[str, int], ...] = (
    {"batch": 1, "past": 0, "steps": 7, "asked": 1, "source": 9, "instruction": 6, "text": 7, "queries": 64},
    {"batch": 1, "past": 6, "steps": 1, "asked": 1, "source": 5, "instruction": 1, "text": 2, "queries": 1},
    {"batch": 3, "past": 0, "steps": 5, "asked": 2, "source": 8, "instruction": 9, "text": 5, "queries": 3},
    {"batch": 2, "past": 4, "steps": 3, "asked": 3, "source": 6, "instruction": 4, "text": 9, "queries": 5},
)
"""Axis lengths of the test cases: prefill, a decode step, a ragged batch, and the verification of draft tokens."""

SEED = 20230130  # the day BLIP-2 appeared on arXiv


def _ragged_mask(_: np.random.Generator, shape: Sequence[int], __: Mapping[str, Array]) -> Array:
    """Makes a mask of ones; each row but the first has a different number of zeros (padded slots) on the left."""
    mask = np.ones(shape, np.int64)
    for row in range(1, shape[0]):
        mask[row, : min(row, shape[1] - 1)] = 0
    return mask


def _positions(_: np.random.Generator, shape: Sequence[int], drawn: Mapping[str, Array]) -> Array:
    """Makes the positions of the new tokens, counted over the valid slots of ``attention_mask`` as in the runtime."""
    positions: Array = np.maximum(drawn["attention_mask"].cumsum(axis=1) - 1, 0)
    return positions[:, -shape[1] :]


def _counted(_: np.random.Generator, shape: Sequence[int], __: Mapping[str, Array]) -> Array:
    """Makes an input whose rows count from 0: 0, 1, 2 and so on."""
    return np.broadcast_to(np.arange(shape[1]), shape).copy()


def _asked(_: np.random.Generator, shape: Sequence[int], drawn: Mapping[str, Array]) -> Array:
    """Makes ``logits_indices``: the indices of the last new tokens."""
    steps = drawn["position_ids" if "position_ids" in drawn else "input_ids"].shape[1]
    return np.broadcast_to(np.arange(steps - min(shape[1], steps), steps), (shape[0], min(shape[1], steps))).copy()


def _cross_mask(rng: np.random.Generator, shape: Sequence[int], drawn: Mapping[str, Array]) -> Array:
    """Makes ``cross_attention_mask``: ``[B, E]`` with padding, or a random ``[B, S, E]``.

    If there are several tokens in a mask ``[B, S, E]``, the first token attends to no key.
    """
    if len(shape) == 2:
        return _ragged_mask(rng, shape, drawn)
    mask = rng.integers(0, 2, shape)
    if shape[1] > 1:
        mask[:, 0] = 0
    return mask


def _tokens(rng: np.random.Generator, shape: Sequence[int], _: Mapping[str, Array]) -> Array:
    """Draws token ids below 16, which every vocabulary has."""
    return rng.integers(0, 16, shape)


DRAW: dict[str, Callable[[np.random.Generator, Sequence[int], Mapping[str, Array]], Array]] = {
    "attention_mask": _ragged_mask,
    "cross_attention_mask": _cross_mask,
    "position_ids": _positions,
    "logits_indices": _asked,
    "input_ids": _tokens,
    "text_positions": _counted,
    "instruction_ids": _tokens,
    "instruction_mask": _ragged_mask,
    QUERY_IDS: _counted,
}
"""Functions that make a graph's inputs, by the input's name. All other inputs are drawn from a standard normal."""


def random_inputs(spec: GraphSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
    """Draws random inputs of a graph; floating-point inputs are float32."""
    drawn: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tensor.shape(sizes)
        draw = DRAW.get(tensor.name)
        drawn[tensor.name] = draw(rng, shape, drawn) if draw else rng.standard_normal(shape, dtype=np.float32)
    return drawn


def cases_of(spec: GraphSpec) -> Iterator[dict[str, int]]:
    """Yields the axis lengths of each test case, limited to the ranges of the graph's axes; no case is repeated."""
    axes = spec.axes()
    found: list[dict[str, int]] = []
    for case in CASES:
        sizes = {name: min(max(case[name], axis.min), axis.max) for name, axis in axes.items()}
        if sizes not in found:
            found.append(sizes)
            yield sizes


def compare(
    make_module: Callable[[], nn.Module], graph: Path, spec: GraphSpec, precision: str, sample: str = ""
) -> list[Parity]:
    """Runs a graph and its torch module on the same inputs, and compares the outputs.

    The graph runs first, then the module, so that only one of the two is in memory. If patches are merged, the last
    digit of a cosine may decide which pairs are merged. So torch merges the same pairs as the graph, and each of these
    pairs must be as similar as torch's best pair, within a separate tolerance.

    Args:
        make_module: Function that makes the module in float32, with the checkpoint's weights.
        graph: The ``.onnx`` file.
        spec: Inputs and outputs of the graph, in its precision.
        precision: Precision of the graph, which decides the tolerance.
        sample: The part of the model that is compared; empty for the whole model.

    Returns:
        A result for each output; the keys of all layers count as one output, and so do the values.

    Raises:
        ParityError: The difference of an output from torch's exceeds the tolerance, or an output is not finite.
    """
    cases = list(cases_of(spec))
    drawn = [random_inputs(spec, sizes, np.random.default_rng([SEED, index])) for index, sizes in enumerate(cases)]
    with merging.with_choices(graph, spec) as (path, choices):
        answers = _outputs_of(OnnxRuntimeSession(path, lean=bool(sample)), spec, drawn)
    release_memory()
    module = make_module()
    worst: dict[str, tuple[float, float]] = {}
    for inputs, got in zip(drawn, answers, strict=True):
        with merging.guided(module, [got[name] for name in choices]) as guide:
            references = _reference(module, spec, inputs)
        differences = {name: _difference(got[name], reference) for name, reference in references.items()}
        differences |= {} if guide is None else {merging.PAIRS: (guide.shortfall, guide.shortfall)}
        for name, (difference, relative) in differences.items():
            before = worst.get(_group(name), (0.0, 0.0))
            worst[_group(name)] = (max(before[0], difference), max(before[1], relative))
    shapes = tuple(", ".join(f"{name} {size}" for name, size in sizes.items()) for sizes in cases)
    results = [
        Parity(name, difference, relative, tolerance_of(name, precision), shapes, sample)
        for name, (difference, relative) in worst.items()
    ]
    for result in results:
        if not result.relative <= result.tolerance:
            raise ParityError(
                f"{spec.name}: {result.output} is off by {result.relative:.1e} {_unit(result.output)}, more than the "
                f"{result.tolerance:.0e} allowed in {precision}",
                f"nothing was written; export with {option('precision')} fp32, "
                "or report it with the checkpoint's config.json",
            )
    return results


def tolerance_of(output: str, precision: str) -> float:
    """Returns the largest allowed difference of an output; the merged pairs have a separate tolerance."""
    return (merging.TOLERANCES if output == merging.PAIRS else TOLERANCES)[precision]


def _unit(output: str) -> str:
    return "in cosine" if output == merging.PAIRS else "of its largest value"


def _group(name: str) -> str:
    parts = name.split(".")
    return f"{parts[0]}.{parts[-1]}" if parts[0] in ("present", QUERIES) else name


def _outputs_of(
    session: OnnxRuntimeSession, spec: GraphSpec, drawn: Sequence[Mapping[str, Array]]
) -> list[dict[str, Array]]:
    """Runs a graph on the inputs of every case; returns its outputs by name for each case."""
    return [
        session.run({tensor.name: inputs[tensor.name].astype(tensor.dtype) for tensor in spec.inputs})
        for inputs in drawn
    ]


def _reference(module: nn.Module, spec: GraphSpec, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Runs the torch module on the inputs of one case; returns its outputs by name, in float32."""
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(array) for array in inputs.values()))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = zip(spec.outputs, outputs, strict=True)
    return {tensor.name: output.float().numpy() for tensor, output in named}


def _difference(got: Array, reference: Array) -> tuple[float, float]:
    """Returns the largest absolute difference, and this difference divided by the largest absolute reference value.

    Both are infinite if the quotient is not a number.
    """
    difference = float(np.abs(got.astype(np.float32) - reference).max(initial=0.0))
    relative = difference / max(float(np.abs(reference).max(initial=0.0)), 1e-12)
    return (difference, relative) if relative == relative else (float("inf"), float("inf"))


def sampled_layers(count: int) -> list[int]:
    """Returns the indices of the first, middle and last of ``count`` layers; only 0 if ``count`` is 0."""
    return sorted({0, count // 2, max(count - 1, 0)})


def compare_whole(name: str, model: Model, directory: Path, traced: Traced, precision: str) -> list[Parity]:
    """Compares a whole graph with torch.

    Args:
        name: Name of the graph.
        model: The checkpoint's model in float32.
        directory: The directory that the graph was written to.
        traced: The traced graph, whose spec names the file.
        precision: Precision of the graph.

    Raises:
        ParityError: The difference of an output from torch's exceeds the tolerance, or an output is not finite.
    """
    module = GRAPHS[name].wrap(model)
    if precision != "bf16":
        return compare(lambda: module, directory / traced.spec.file, traced.spec, precision)
    state = module.state_dict()
    twin = trace(GRAPHS[name].wrap(_meta_model(model.config)), GRAPHS[name].spec(model.config))
    with _bf16_twin(twin, lambda parameter: state[parameter], directory) as graph:
        return compare(lambda: module, graph, twin.spec, precision, BF16_SAMPLE)


BF16_SAMPLE = "weights rounded to bf16, computed in fp32"


@contextmanager
def _bf16_twin(traced: Traced, read: Callable[[str], Tensor], directory: Path) -> Iterator[Path]:
    """Writes an FP32 graph with weights rounded to bf16, and yields its file, which is removed afterwards.

    ONNX Runtime cannot run bf16 graphs on the CPU.
    """
    data, graph = directory / ".twin.data", directory / ".twin.onnx"
    try:
        write_weights(traced, lambda name: read(name).to(torch.bfloat16), data, torch.float32)
        ir.save(traced.model, graph)
        yield graph
    finally:
        data.unlink(missing_ok=True)
        graph.unlink(missing_ok=True)


def compare_sample(
    name: str, config: Config, read: Callable[[str], Tensor], weights: Weights, precision: str
) -> list[Parity]:
    """Compares a graph with the torch model one layer at a time, if the whole graph needs too much memory.

    For each sampled layer, the module is traced again with only this layer in its list of layers; the modules before
    and after the list stay. This small graph reads its weights from the data file of the exported graph, so the
    exported weights are checked. Only one layer is in memory at a time.

    Args:
        name: Name of the graph.
        config: Config of the model.
        read: Function that returns a parameter of the checkpoint, by its name in this project's model.
        weights: Path of the graph's data file, with offset and length of each tensor in it.
        precision: The graph's precision.

    Raises:
        ParityError: The difference of an output from torch's exceeds the tolerance, or an output is not finite.
    """
    results: list[Parity] = []
    path, stack = _stack(name, _meta_model(config))
    depth = len(stack)
    for layer in sampled_layers(depth):
        label = f"layer {layer} of {depth}" if depth else "whole"

        def original(parameter: str, layer: int = layer) -> str:
            return re.sub(rf"{re.escape(path)}\.\d+\.", f"{path}.{layer}.", parameter)

        traced = trace(_cut(name, _meta_model(config), layer), _one_layer_spec(name, config))
        needed = sorted({slot.parameter for slot in traced.slots.values()})

        def module(
            original: Callable[[str], str] = original, layer: int = layer, needed: Sequence[str] = needed
        ) -> nn.Module:
            return _one_layer(name, config, layer, {key: read(original(key)).float() for key in needed})

        if precision == "bf16":
            label = f"{label}, {BF16_SAMPLE}"
            with _bf16_twin(traced, lambda parameter: read(original(parameter)), weights.file.parent) as graph:
                results += compare(module, graph, traced.spec, precision, label)
        else:
            convert(traced, precision, exceptions_of(config))
            point_at(traced, weights.file, {slot: weights.placed[original(slot)] for slot in traced.slots})
            graph = weights.file.with_name(".sample.onnx")
            try:
                ir.save(traced.model, graph)
                results += compare(module, graph, traced.spec, precision, label)
            finally:
                graph.unlink(missing_ok=True)
        release_memory()
    return results


def _meta_model(config: Config) -> Model:
    with torch.device("meta"):
        return build_model(config).eval()


def _stack(name: str, model: Model) -> tuple[str, nn.ModuleList]:
    """Returns the path and the list of a graph's repeated layers; both are empty if the graph has no such list."""
    modules = dict(GRAPHS[name].wrap(model).named_modules())
    for path in GRAPHS[name].stacks:
        found = modules.get(path)
        if isinstance(found, nn.ModuleList):
            return path, found
    return "", nn.ModuleList()


def _cut(name: str, model: Model, layer: int) -> nn.Module:
    """Removes all layers but one from ``model``, and returns the module that is traced for the graph.

    If the vision encoder merges patches, the module has two copies of the layer, because the merging in a layer affects
    the next layer.
    """
    _, stack = _stack(name, model)
    if len(stack):
        kept = stack[layer]
        while len(stack):
            del stack[0]
        stack.extend(copy.deepcopy(kept) for _ in range(_copies(name, model.config)))
    return GRAPHS[name].wrap(model)


def _copies(name: str, config: Config) -> int:
    return 2 if name == VISION and config.vision.merge_tokens else 1


def _one_layer_spec(name: str, config: Config) -> GraphSpec:
    """Returns the spec of a graph with only one layer: it has only this layer's keys and values.

    If the graph has no list of layers, its whole spec is returned.
    """
    if name == VISION and config.vision.merge_tokens:  # each layer has fewer embeddings than the one before
        vision: Any = config.vision
        config = replace(config, vision=replace(vision, num_layers=_copies(name, config)))
    whole = GRAPHS[name].spec(config)
    if not GRAPHS[name].stacks:
        return whole
    return GraphSpec(name, _first_layer(whole.inputs), _first_layer(whole.outputs))


def _first_layer(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Returns the tensors without the keys and values of the second and later layers."""
    return tuple(tensor for tensor in tensors if not LATER_LAYER.match(tensor.name))


LATER_LAYER = re.compile(rf"(past_key_values|present|cross|{QUERIES})\.[1-9]\d*\.")


def _one_layer(name: str, config: Config, layer: int, state: Mapping[str, Tensor]) -> nn.Module:
    """Returns the graph's module with one layer and the weights ``state``.

    Parameters that are not in ``state`` stay on the meta device, without values.
    """
    module = _cut(name, _meta_model(config), layer)
    module.load_state_dict(state, assign=True, strict=False)
    return module


def release_memory() -> None:
    """Returns freed memory to the operating system, if the C library has a function for it."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: freed pages stay with the process
        return
