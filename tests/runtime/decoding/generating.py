"""Runs the code under test for a whole batch with one set of options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.decoding import generate as module
from blip2edge.runtime.decoding.beam_search import beam_search
from blip2edge.runtime.decoding.generate import Generation, GenerationBatch
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.speculative import Speculator


def rows_of(
    first: NDArray[np.float32],
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    row_ids: Sequence[int] | None = None,
    speculators: Sequence[Speculator | None] = (),
    **more: Any,
) -> list[Generation]:
    numbers = range(len(prompts)) if row_ids is None else row_ids
    drafts = speculators or [None] * len(prompts)
    return [
        Generation(ids, options, first.shape[-1], number=number, speculator=draft, **more)
        for ids, number, draft in zip(prompts, numbers, drafts, strict=True)
    ]


def generate(
    first: NDArray[np.float32], state: Any, prompts: Sequence[Sequence[int]], options: GenerationOptions, **more: Any
) -> list[Generated]:
    if options.num_beams > 1:
        return beam_search(first, state, prompts, options, **more)
    return module.generate(first, state, rows_of(first, prompts, options, **more))


def stream(
    first: NDArray[np.float32], state: Any, prompts: Sequence[Sequence[int]], options: GenerationOptions, **more: Any
) -> Iterator[tuple[int, int, str | None]]:
    """Row, token and finish reason of every token, before the next step."""
    rows, batch = rows_of(first, prompts, options, **more), GenerationBatch()
    batch.join(first, state, rows)
    while batch.rows:
        for row in batch.step():
            yield rows.index(row), row.generated[-1], row.finish_reason
