"""Compares and times graphs on the same inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import BRIDGE, DECODER, MATCH, VISION
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.bench.graph_inputs import SEED, TOKENS, Arrays, decode, for_steps
from blip2edge.runtime.decoding.state import Decoder

PROMPT = 32
"""Tokens of the prompt in the timed decoding: the visual tokens of BLIP-2."""

ENOUGH_SECONDS = 1.0
"""Runs are repeated until they took this long in all, at least :data:`FEWEST` and at most :data:`RUNS` times."""

FEWEST, RUNS = 3, 9


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
    outputs, ids = decode(decoder, context)
    if not timed:
        return ProbeResult(outputs, math.nan)
    table = decoder.table
    whole = [table.rows(np.random.default_rng(SEED).integers(0, table.num_rows, prompt))]
    one = first_row(for_steps(context, prompt))

    def generate() -> None:
        _, again = decoder.prefill(whole, one)
        for at in range(TOKENS):
            again.step(ids[:1, at])

    return ProbeResult(outputs, least_cpu_seconds(generate))


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
