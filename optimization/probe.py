"""What graphs are compared and timed on: seeded pictures through the portable graphs, one behind the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import BRIDGE, CROSS_MASK, DECODER, MATCH, VISION, Axis, GraphSpec, TensorSpec
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.decoding.language_model import Decoder

SEED = 6
ROWS = 2
LENGTHS = {"source": 9, "instruction": 6, "text": 7}
VOCABULARY = 16
"""Ids below it are in every vocabulary."""

PROMPT = 32
"""Slots of the prompt that decoding is timed behind: the queries of a BLIP-2."""

TOKENS = 8
"""Tokens that decoding is timed over."""

ENOUGH_SECONDS = 1.0
"""Runs are repeated until they took so much together, at least :data:`FEWEST` and at most :data:`RUNS` times."""

FEWEST, RUNS = 3, 9

Arrays = dict[str, Array]


def pictures(spec: TensorSpec, rng: np.random.Generator) -> Array:
    """Smooth colours with some noise, about as bright as pictures are after preprocessing: ``[2, 3, H, W]``."""
    _, channels, height, width = (dim if isinstance(dim, int) else ROWS for dim in spec.dims)
    coarse = rng.standard_normal((ROWS, channels, 5, 5))
    rows, columns = np.linspace(0, 4, height), np.linspace(0, 4, width)
    smooth = np.apply_along_axis(lambda line: np.interp(rows, np.arange(5), line), 2, coarse)
    smooth = np.apply_along_axis(lambda line: np.interp(columns, np.arange(5), line), 3, smooth)
    noisy = smooth + 0.1 * rng.standard_normal(smooth.shape)
    return np.asarray(noisy, NUMPY_DTYPES[spec.dtype])


def draw_inputs(spec: GraphSpec, seen: Mapping[str, Array]) -> Arrays:
    """Two rows of a graph's inputs.

    Args:
        spec: Its tensors.
        seen: What the graphs before it gave, by name.
    """
    rng = np.random.default_rng(SEED)
    drawn: Arrays = {}
    for tensor in spec.inputs:
        shape = [dim if isinstance(dim, int) else _length(dim) for dim in tensor.dims]
        if tensor.name == "pixel_values":
            drawn[tensor.name] = pictures(tensor, rng)
        elif tensor.name in seen:
            drawn[tensor.name] = seen[tensor.name]
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
    """One row of each."""
    return {name: array[:1] for name, array in inputs.items()}


KNOWN = (VISION, BRIDGE, DECODER, MATCH, "text_encoder", "cross_kv", "image_features", "text_embeds")
"""Graphs whose inputs can be drawn here."""


@dataclass(frozen=True)
class Answers:
    """What a graph gave, and what it took.

    Attributes:
        outputs: By name.
        seconds: CPU time of the timed work, the least of some runs.
    """

    outputs: Arrays
    seconds: float


def ask(session: Session, inputs: Mapping[str, Array]) -> Answers:
    """Runs a graph on two rows, and times it on one."""
    outputs = session.run(inputs)
    one = first_row(inputs)
    return Answers(outputs, least_seconds(lambda: session.run(one)))


def decode(decoder: Decoder, context: Mapping[str, Array], prompt: int = PROMPT) -> Answers:
    """Decodes as generation does: prompts of different length, steps, several tokens at once, forgetting, reordering.

    Args:
        decoder: The decoder.
        context: What it looks at beside its text, two rows of it.
        prompt: Slots of the prompt that it is timed behind.

    Returns:
        Logits of each kind of step.
    """
    rng = np.random.default_rng(SEED)
    table = decoder.table
    ids = rng.integers(0, table.num_rows, (ROWS, 6 + 3 + TOKENS))
    prompts = [table.rows(ids[0, :5]), table.rows(ids[1, :3])]
    logits, state = decoder.prefill(prompts, _only_last_slots(context, 5))
    outputs = {"prefill": logits, "step": state.step(ids[:, 5])}
    before = state.lengths
    outputs["extend"] = state.extend(ids[:, 6:9])
    state.truncate(before + np.array([1, 2], np.int64))
    state.select(np.array([1, 0]))
    outputs["after"] = state.step(ids[:, 9])
    whole = [table.rows(rng.integers(0, table.num_rows, prompt))]
    one = first_row(_only_last_slots(context, prompt))

    def generate() -> None:
        _, again = decoder.prefill(whole, one)
        for at in range(TOKENS):
            again.step(ids[:1, at])

    return Answers(outputs, least_seconds(generate))


def _only_last_slots(context: Mapping[str, Array], steps: int) -> Arrays:
    """A context whose mask has a row a slot is made for as many slots as are read."""
    made = dict(context)
    looks = made.get(CROSS_MASK)
    if looks is not None and looks.ndim == 3:
        made[CROSS_MASK] = np.repeat(looks[:, -1:], steps, axis=1)
    return made


def least_seconds(work: Callable[[], object]) -> float:
    """The least CPU time of some runs: what others take from the machine only ever adds."""
    work()
    times: list[float] = []
    while len(times) < RUNS and (len(times) < FEWEST or sum(times) < ENOUGH_SECONDS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def cosine(one: Array, other: Array) -> float:
    """Of two arrays taken as vectors; 1 where both are zero."""
    first, second = (np.asarray(array, np.float64).ravel() for array in (one, other))
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float(np.array_equal(first, second))


def relative(got: Array, wanted: Array) -> tuple[float, float]:
    """The largest absolute difference, and its share of the largest wanted value; infinite where one is not finite."""
    if not np.isfinite(got).all():
        return float("inf"), float("inf")
    difference = float(np.abs(np.asarray(got, np.float32) - wanted).max(initial=0.0))
    return difference, difference / max(float(np.abs(wanted).max(initial=0.0)), 1e-12)


def worst_cosine(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """The smallest cosine over the outputs."""
    return min((cosine(got[name], array) for name, array in wanted.items()), default=1.0)
