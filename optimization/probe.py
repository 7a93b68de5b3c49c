"""Compares and times graphs on the same inputs: seeded images that pass through the portable graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import BRIDGE, CROSS_MASK, DECODER, MATCH, VISION, Axis, GraphSpec, TensorSpec
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.decoding.state import Decoder

SEED = 6
ROWS = 2
LENGTHS = {"source": 9, "instruction": 6, "text": 7}
VOCABULARY = 16
"""Token ids below it are in every vocabulary."""

PROMPT = 32
"""Tokens of the prompt in the timed decoding: the visual tokens of BLIP-2."""

TOKENS = 8
"""Decode steps in the timed decoding."""

ENOUGH_SECONDS = 1.0
"""Runs are repeated until they took this long in all, at least :data:`FEWEST` and at most :data:`RUNS` times."""

FEWEST, RUNS = 3, 9

Arrays = dict[str, Array]


def pictures(spec: TensorSpec, rng: np.random.Generator) -> Array:
    """Draws two test pictures ``[2, 3, H, W]``: smooth colours with noise, about as bright as preprocessed images."""
    _, channels, height, width = (dim if isinstance(dim, int) else ROWS for dim in spec.dims)
    coarse = rng.standard_normal((ROWS, channels, 5, 5))
    rows, columns = np.linspace(0, 4, height), np.linspace(0, 4, width)
    smooth = np.apply_along_axis(lambda line: np.interp(rows, np.arange(5), line), 2, coarse)
    smooth = np.apply_along_axis(lambda line: np.interp(columns, np.arange(5), line), 3, smooth)
    noisy = smooth + 0.1 * rng.standard_normal(smooth.shape)
    return np.asarray(noisy, NUMPY_DTYPES[spec.dtype])


def draw_inputs(spec: GraphSpec, upstream: Mapping[str, Array]) -> Arrays:
    """Draws random inputs of a graph, a batch of two rows.

    Args:
        spec: The graph's inputs and outputs.
        upstream: Outputs of the graphs that run before this one, by name.
    """
    rng = np.random.default_rng(SEED)
    drawn: Arrays = {}
    for tensor in spec.inputs:
        shape = [dim if isinstance(dim, int) else _length(dim) for dim in tensor.dims]
        if tensor.name == "pixel_values":
            drawn[tensor.name] = pictures(tensor, rng)
        elif tensor.name in upstream:
            drawn[tensor.name] = upstream[tensor.name]
        elif tensor.name.endswith("mask"):
            drawn[tensor.name] = np.ones(shape, np.int64)
            drawn[tensor.name][-1, ..., -1] = 0
        elif tensor.dtype == "int64":
            drawn[tensor.name] = rng.integers(0, VOCABULARY, shape)
        else:
            drawn[tensor.name] = rng.standard_normal(shape).astype(NUMPY_DTYPES[tensor.dtype])
    return drawn


def _length(axis: Axis) -> int:
    return ROWS if axis.name == "batch" else min(max(LENGTHS.get(axis.name, axis.opt), axis.min), axis.max)


def first_row(inputs: Mapping[str, Array]) -> Arrays:
    """Returns the first row of each input, as a batch of one."""
    return {name: array[:1] for name, array in inputs.items()}


PROBED_GRAPHS = (VISION, BRIDGE, DECODER, MATCH, "text_encoder", "cross_kv", "image_features", "text_embeds")
"""Graphs whose inputs can be drawn here."""


@dataclass(frozen=True)
class ProbeResult:
    """Outputs of a graph on test inputs, and the time of a run.

    Attributes:
        outputs: The graph's outputs by name.
        seconds: The least CPU time of several runs; NaN if it was not measured.
    """

    outputs: Arrays
    seconds: float


def run_and_time(session: Session, inputs: Mapping[str, Array], *, timed: bool = True) -> ProbeResult:
    """Runs a graph on two rows for its outputs, and measures its time on one row if ``timed``."""
    outputs = {name: np.asarray(array) for name, array in session.run(inputs).items()}
    one = first_row(inputs)
    if not timed:
        return ProbeResult(outputs, math.nan)
    return ProbeResult(outputs, least_cpu_seconds(lambda: session.run(one)))


def decode_and_time(
    decoder: Decoder, context: Mapping[str, Array], prompt: int = PROMPT, *, timed: bool = True
) -> ProbeResult:
    """Decodes as generation does: ragged prompts, decode steps, several tokens at once, truncated and reordered rows.

    Args:
        decoder: The decoder to test.
        context: Keys, values and mask of the cross-attention, two rows each; empty for a decoder without
            cross-attention.
        prompt: Number of prompt tokens in the timed decoding.
        timed: Whether to measure the time.

    Returns:
        Logits of each kind of step, and the time of a prefill with :data:`TOKENS` decode steps; NaN if not ``timed``.
    """
    rng = np.random.default_rng(SEED)
    table = decoder.table
    ids = rng.integers(0, table.num_rows, (ROWS, 6 + 3 + TOKENS))
    prompts = [table.rows(ids[0, :5]), table.rows(ids[1, :3])]
    logits, state = decoder.prefill(prompts, _for_steps(context, 5))
    outputs = {"prefill": logits, "step": state.step(ids[:, 5])}
    before = state.lengths
    outputs["extend"] = state.extend(ids[:, 6:9])
    state.truncate(before + np.array([1, 2], np.int64))
    state.select(np.array([1, 0]))
    outputs["after"] = state.step(ids[:, 9])
    if not timed:
        return ProbeResult(outputs, math.nan)
    whole = [table.rows(rng.integers(0, table.num_rows, prompt))]
    one = first_row(_for_steps(context, prompt))

    def generate() -> None:
        _, again = decoder.prefill(whole, one)
        for at in range(TOKENS):
            again.step(ids[:1, at])

    return ProbeResult(outputs, least_cpu_seconds(generate))


def _for_steps(context: Mapping[str, Array], steps: int) -> Arrays:
    """The context for ``steps`` new tokens: a mask with a row for each new token gets that many rows."""
    made = dict(context)
    mask = made.get(CROSS_MASK)
    if mask is not None and mask.ndim == 3:
        made[CROSS_MASK] = np.repeat(mask[:, -1:], steps, axis=1)
    return made


def least_cpu_seconds(run: Callable[[], object]) -> float:
    """Calls ``run`` several times; returns the least CPU time, because other processes can only add time."""
    run()
    times: list[float] = []
    while len(times) < RUNS and (len(times) < FEWEST or sum(times) < ENOUGH_SECONDS):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def cosine(one: Array, other: Array) -> float:
    """Computes the cosine of two arrays, taken as vectors; 1 if both are zero."""
    first, second = (np.asarray(array, np.float64).ravel() for array in (one, other))
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float(np.array_equal(first, second))


def relative(got: Array, wanted: Array) -> tuple[float, float]:
    """Returns the largest absolute difference, and its ratio to the largest absolute value of ``wanted``.

    Both are infinite if ``got`` has a value that is not finite.
    """
    if not np.isfinite(got).all():
        return float("inf"), float("inf")
    difference = float(np.abs(np.asarray(got, np.float32) - wanted).max(initial=0.0))
    return difference, difference / max(float(np.abs(wanted).max(initial=0.0)), 1e-12)


def worst_cosine(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """Returns the smallest cosine between ``got`` and ``wanted`` over all outputs."""
    return min((cosine(got[name], array) for name, array in wanted.items()), default=1.0)
