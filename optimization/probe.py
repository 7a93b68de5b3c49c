"""Makes functions that run graphs, to be timed, and compares the outputs of graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.bench.certificate.graph_inputs import SEED, Arrays, for_steps
from blip2edge.runtime.decoding.state import Decoder

PROMPT, STEPS = 32, 16
"""Sizes of the decoding that is timed.

The prompt has as many tokens as BLIP-2 has visual tokens, and the number of decode steps is that of a short caption.
"""


def first_row(inputs: Mapping[str, Array]) -> Arrays:
    """Returns the first row of each input, as a batch of one."""
    return {name: array[:1] for name, array in inputs.items()}


def run_of(session: Session, inputs: Mapping[str, Array]) -> Callable[[], object]:
    """Returns a function that runs a graph on one row of ``inputs``, to be timed."""
    one = first_row(inputs)
    return lambda: session.run(one)


def decoding_of(decoder: Decoder, context: Mapping[str, Array], prompt: int = PROMPT) -> Callable[[], object]:
    """Returns a function that decodes a short caption of one row, to be timed.

    Args:
        decoder: The decoder.
        context: Keys, values and mask of the cross-attention; empty for a decoder without cross-attention.
        prompt: Number of prompt tokens; :data:`STEPS` decode steps follow.
    """
    table, rng = decoder.table, np.random.default_rng(SEED)
    whole = [table.rows(rng.integers(0, table.num_rows, prompt))]
    ids = rng.integers(0, table.num_rows, (1, STEPS))
    one = first_row(for_steps(context, prompt))

    def generate() -> None:
        _, state = decoder.prefill(whole, one)
        for at in range(STEPS):
            state.step(ids[:, at])

    return generate


def cosine(one: Array, other: Array) -> float:
    """Computes the cosine of two arrays, which are flattened to vectors; 1 if both are zero."""
    first, second = (np.asarray(array, np.float64).ravel() for array in (one, other))
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float(np.array_equal(first, second))


def relative(got: Array, wanted: Array) -> tuple[float, float]:
    """Returns the largest absolute difference, and this difference divided by the largest absolute value of ``wanted``.

    Both are infinite if ``got`` has a value that is not finite.
    """
    if not np.isfinite(got).all():
        return float("inf"), float("inf")
    difference = float(np.abs(np.asarray(got, np.float32) - wanted).max(initial=0.0))
    return difference, difference / max(float(np.abs(wanted).max(initial=0.0)), 1e-12)


def worst_cosine(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """Returns the smallest cosine between ``got`` and ``wanted`` over all outputs."""
    return min((cosine(got[name], array) for name, array in wanted.items()), default=1.0)
