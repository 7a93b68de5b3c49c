"""Parity: the exported graph and torch, on the same random inputs, through the session that ships."""

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

from blip2edge.bundle.schema import QUERIES, VISION, GraphSpec, Parity, TensorSpec
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
"""Largest allowed difference, as a share of the output's largest absolute value, by precision."""

CASES: tuple[dict[str, int], ...] = (
    {"batch": 1, "past": 0, "steps": 7, "asked": 1, "source": 9, "instruction": 6, "text": 7},
    {"batch": 1, "past": 6, "steps": 1, "asked": 1, "source": 5, "instruction": 1, "text": 2},
    {"batch": 3, "past": 0, "steps": 5, "asked": 2, "source": 8, "instruction": 9, "text": 5},
    {"batch": 2, "past": 4, "steps": 3, "asked": 3, "source": 6, "instruction": 4, "text": 9},
)
"""Prefill, decode, a ragged batch, and the verification of a draft."""

SEED = 20230130  # the day BLIP-2 appeared on arXiv


def _ragged_mask(_: np.random.Generator, shape: Sequence[int], __: Mapping[str, Array]) -> Array:
    """Ones, with another number of padded slots on the left of every row but the first."""
    mask = np.ones(shape, np.int64)
    for row in range(1, shape[0]):
        mask[row, : min(row, shape[1] - 1)] = 0
    return mask


def _positions(_: np.random.Generator, shape: Sequence[int], drawn: Mapping[str, Array]) -> Array:
    """Counted over the valid slots, as the runtime does."""
    positions: Array = np.maximum(drawn["attention_mask"].cumsum(axis=1) - 1, 0)
    return positions[:, -shape[1] :]


def _counted(_: np.random.Generator, shape: Sequence[int], __: Mapping[str, Array]) -> Array:
    """From 0 on."""
    return np.broadcast_to(np.arange(shape[1]), shape).copy()


def _asked(_: np.random.Generator, shape: Sequence[int], drawn: Mapping[str, Array]) -> Array:
    """The last slots, the very last among them."""
    steps = drawn["position_ids" if "position_ids" in drawn else "input_ids"].shape[1]
    return np.broadcast_to(
        np.arange(steps - min(shape[1], steps), steps), (shape[0], min(shape[1], steps))
    ).copy()


def _cross_mask(rng: np.random.Generator, shape: Sequence[int], drawn: Mapping[str, Array]) -> Array:
    """Keys ``[B, E]`` as padded texts are; or ``[B, S, E]``, what each slot looks at: at first nothing, then any."""
    if len(shape) == 2:
        return _ragged_mask(rng, shape, drawn)
    mask = rng.integers(0, 2, shape)
    if shape[1] > 1:
        mask[:, 0] = 0
    return mask


def _tokens(rng: np.random.Generator, shape: Sequence[int], _: Mapping[str, Array]) -> Array:
    """Token ids that every vocabulary has."""
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
}
"""How an input is drawn; any other is standard normal."""


def draw_inputs(spec: GraphSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
    """Random inputs of a graph, floating ones in float32."""
    drawn: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tensor.shape(sizes)
        draw = DRAW.get(tensor.name)
        drawn[tensor.name] = draw(rng, shape, drawn) if draw else rng.standard_normal(shape, dtype=np.float32)
    return drawn


def cases_of(spec: GraphSpec) -> Iterator[dict[str, int]]:
    """The cases that differ for a graph, within its axes' ranges."""
    axes = spec.axes()
    seen: list[dict[str, int]] = []
    for case in CASES:
        sizes = {name: min(max(case[name], axis.min), axis.max) for name, axis in axes.items()}
        if sizes not in seen:
            seen.append(sizes)
            yield sizes


def compare(
    make_module: Callable[[], nn.Module], graph: Path, spec: GraphSpec, precision: str, sample: str = ""
) -> list[Parity]:
    """Runs a graph and its module on the same inputs, one after the other, so that memory holds one of them.

    Where patches are merged, which pair is the nearest may hang on the last digit. So torch merges the pairs that the
    graph chose, and each of those must be as near as the best by torch's own cosines, within a tolerance of its own.

    Args:
        make_module: Gives it in float32, with the checkpoint's weights.
        graph: The ``.onnx`` file.
        spec: Its tensors, in its precision.
        precision: Chooses the tolerance.
        sample: What part of the model this is; empty for the whole.

    Returns:
        One result an output; the keys and values of all layers count as one output each.

    Raises:
        ParityError: An output is further from torch than its tolerance, or not finite.
    """
    cases = list(cases_of(spec))
    drawn = [
        draw_inputs(spec, sizes, np.random.default_rng([SEED, index])) for index, sizes in enumerate(cases)
    ]
    with merging.with_choices(graph, spec) as (path, choices):
        answers = _answers(OnnxRuntimeSession(path, lean=bool(sample)), spec, drawn)
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
                f"{result.tolerance:.0e} that {precision} may be",
                f"nothing was written; export with {option('precision')} fp32, "
                "or report it with the checkpoint's config.json",
            )
    return results


def tolerance_of(output: str, precision: str) -> float:
    """How far an output may be from torch; the pairs that a graph merges have a bound of their own."""
    return (merging.TOLERANCES if output == merging.PAIRS else TOLERANCES)[precision]


def _unit(output: str) -> str:
    return "in cosine" if output == merging.PAIRS else "of its largest value"


def _group(name: str) -> str:
    parts = name.split(".")
    return f"{parts[0]}.{parts[-1]}" if parts[0] in ("present", QUERIES) else name


def _answers(
    session: OnnxRuntimeSession, spec: GraphSpec, drawn: Sequence[Mapping[str, Array]]
) -> list[dict[str, Array]]:
    """What a graph gives for every case."""
    return [
        session.run({tensor.name: inputs[tensor.name].astype(tensor.dtype) for tensor in spec.inputs})
        for inputs in drawn
    ]


def _reference(module: nn.Module, spec: GraphSpec, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What torch gives for one."""
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(array) for array in inputs.values()))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = zip(spec.outputs, outputs, strict=True)
    return {tensor.name: output.float().numpy() for tensor, output in named}


def _difference(got: Array, reference: Array) -> tuple[float, float]:
    """The largest, and its share of the largest value; infinite where one is not finite."""
    difference = float(np.abs(got.astype(np.float32) - reference).max(initial=0.0))
    relative = difference / max(float(np.abs(reference).max(initial=0.0)), 1e-12)
    return (difference, relative) if relative == relative else (float("inf"), float("inf"))


def sampled_layers(count: int) -> list[int]:
    """First, middle and last of ``count`` layers; 0 alone where nothing is repeated."""
    return sorted({0, count // 2, max(count - 1, 0)})


def compare_whole(name: str, model: Model, directory: Path, traced: Traced, precision: str) -> list[Parity]:
    """Parity of a whole graph.

    Args:
        name: The graph.
        model: The checkpoint in float32.
        directory: Where the graph was written.
        traced: The graph.
        precision: Of the graph.

    Raises:
        ParityError: See :func:`compare`.
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
    """An FP32 graph with the rounded weights: ONNX Runtime's CPU kernels know no bf16."""
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
    """Parity of single layers, with all that stands before and after them, on the *published* weights.

    The same module, traced by the same code, with one layer of the stack: its initializers point into the file
    that was written for the whole graph, so that what is run are the bytes that ship. Memory holds one layer.

    Args:
        name: The graph.
        config: The captioner.
        read: Gives a parameter of the checkpoint by our name.
        weights: The file beside the published graph, and where its tensors lie.
        precision: Of the published graph.

    Raises:
        ParityError: See :func:`compare`.
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
            with _bf16_twin(
                traced, lambda parameter: read(original(parameter)), weights.file.parent
            ) as graph:
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
    """The layers that a graph repeats, and where they stand; none where it repeats none."""
    modules = dict(GRAPHS[name].wrap(model).named_modules())
    for path in GRAPHS[name].stacks:
        found = modules.get(path)
        if isinstance(found, nn.ModuleList):
            return path, found
    return "", nn.ModuleList()


def _cut(name: str, model: Model, layer: int) -> nn.Module:
    """The graph's module with one layer left; twice where what a layer merges changes the next."""
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
    """With the keys and values of one layer; of a graph that is not cut, with all of them."""
    if name == VISION:
        config = replace(config, vision=replace(config.vision, num_layers=_copies(name, config)))
    whole = GRAPHS[name].spec(config)
    if not GRAPHS[name].stacks:
        return whole
    return GraphSpec(name, _first_layer(whole.inputs), _first_layer(whole.outputs))


def _first_layer(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Without the keys and values of any layer but the first."""
    return tuple(tensor for tensor in tensors if not LATER_LAYER.match(tensor.name))


LATER_LAYER = re.compile(rf"(past_key_values|present|cross|{QUERIES})\.[1-9]\d*\.")


def _one_layer(name: str, config: Config, layer: int, state: Mapping[str, Tensor]) -> nn.Module:
    """The graph's module with one layer; what the graph does not need stays without weights."""
    module = _cut(name, _meta_model(config), layer)
    module.load_state_dict(state, assign=True, strict=False)
    return module


def release_memory() -> None:
    """Gives freed memory back to the system, where the C library can."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: freed pages stay with the process
        return
