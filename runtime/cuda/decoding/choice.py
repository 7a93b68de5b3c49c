"""Makes the launches and buffers with which the GPU chooses the next tokens of B rows: the likeliest, or at random.

To draw a token at random, a kernel needs a random number. The host copies the random numbers of all later tokens to the
GPU beforehand, one for each slot, and the kernel uses the number of the previous token's slot. So no step waits for the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.cuda.device.interface import KernelDevice, freed_on_error
from blip2edge.runtime.cuda.kernel import THREADS, Launch
from blip2edge.runtime.cuda.plan import FLOAT, INT, RunBuffers
from blip2edge.runtime.cuda.steps import BEST_BYTES, WARPS, ChooseArguments, SampleArguments, score_kernel
from blip2edge.runtime.cuda.token_table import TableOnDevice
from blip2edge.runtime.cuda.weights import DecoderWeights
from blip2edge.runtime.decoding.sampling import Draws, StepScores

LOGITS_OF_A_THREAD = 4

DOUBLE = 8  # bytes

LEFT_TO_HOST = -2
"""Value in place of a token that the host must choose; equals ``LEFT_TO_HOST`` in ``sample.cuh``."""

GREEDY = Draws(0.0, 0, 1.0, np.zeros(0))
"""The values with which the drawing kernel chooses the likeliest token."""


@dataclass(frozen=True)
class _Marks:
    """Addresses of the buffers for choosing tokens, in the order of ``ChooseArguments``.

    ``tokens`` and ``logprobs`` are neighbours, so that one copy reads both.
    """

    seen: int
    penalty: int
    held: int
    held_steps: int
    tokens: int
    logprobs: int
    parts: int
    arrived: int


@dataclass(frozen=True)
class _Drawing:
    """Addresses of the buffers for drawing tokens, in the order of ``SampleArguments``."""

    temperature: int
    top_k: int
    limit: int
    uniform: int
    scores: int
    maxima: int
    masses: int


class TokenChoice:
    """Buffers and launches that choose the tokens of B rows; used by one text or batch at a time.

    Args:
        device: The GPU.
        weights: The decoder's weights.
        table: The token embedding table on the GPU.
        rows: B, the number of rows.

    Attributes:
        addresses: Addresses of all buffers.
        draws: Whether the present texts have rows whose tokens are drawn at random.
    """

    def __init__(self, device: KernelDevice, weights: DecoderWeights, table: TableOnDevice, rows: int) -> None:
        self._device, self._weights, self._table, self._rows = device, weights, table, rows
        self.addresses: list[int] = []
        self.draws = False
        self._vocabulary, self._slots = weights.layout.vocabulary, weights.layout.max_positions
        self._cuts = choice_cuts(self._vocabulary, device.multiprocessors)
        marks = rows * self._vocabulary
        sizes = (marks, FLOAT * rows, marks, INT * rows, (INT + FLOAT) * rows)
        with freed_on_error(device, self.addresses):
            seen, penalty, held, held_steps, tokens = (self._new(size) for size in sizes)
            parts, arrived = self._new(BEST_BYTES * rows * self._cuts), self._new(INT * rows)
        self._marks = _Marks(seen, penalty, held, held_steps, tokens, tokens + INT * rows, parts, arrived)
        self._drawing: _Drawing | None = None  # made for the first text that draws

    @property
    def chosen(self) -> int:
        """Returns the address of the tokens, int32 ``[B]``; their log-probabilities, float32 ``[B]``, follow."""
        return self._marks.tokens

    def begin(self, rules: Sequence[StepScores], lengths: NDArray[np.int64]) -> None:
        """Copies the rules of new texts to the GPU; each step then keeps them up to date.

        Args:
            rules: How the token of each row is chosen.
            lengths: Number of tokens that each row has in the cache, ``[B]``.
        """
        device, marks = self._device, self._marks
        held = [rule.held if rule.held_steps > 0 else rule.held[:0] for rule in rules]
        device.write(marks.seen, _marked([rule.seen for rule in rules], self._vocabulary))
        device.write(marks.held, _marked(held, self._vocabulary))
        device.write(marks.penalty, np.array([rule.penalty for rule in rules], np.float32))
        device.write(marks.held_steps, np.array([rule.held_steps for rule in rules], np.int32))
        self.draws = any(rule.draws is not None for rule in rules)
        if self.draws:
            self._write_draws([rule.draws or GREEDY for rule in rules], lengths)

    def launches(self, buffers: RunBuffers) -> list[Launch]:
        """Makes the launches that choose the tokens of the present texts, and copy their embeddings.

        Args:
            buffers: Buffers of the decode step.
        """
        weights, table, marks = self._weights, self._table, self._marks
        layout, grid = weights.layout, (self._cuts, self._rows, 1)
        choose = ChooseArguments(
            buffers.logits, marks.seen, marks.penalty, marks.held, marks.held_steps, buffers.before,
            marks.tokens, marks.logprobs, table.address, table.scales, weights.positions, buffers.x,
            marks.parts, marks.arrived, layout.vocabulary, layout.width, table.format.block, layout.position_offset,
            layout.positions.shape[0] if layout.positions is not None else 0,
        )  # fmt: skip
        if not self.draws or self._drawing is None:
            return [Launch(table.format.kernel, grid, choose)]
        arguments = SampleArguments(choose, *vars(self._drawing).values(), self._slots)
        return [Launch(kernel, grid, arguments) for kernel in (score_kernel(), table.format.drawing_kernel)]

    def _new(self, size: int) -> int:
        self.addresses.append(self._device.allocate(size))
        return self.addresses[-1]

    def _write_draws(self, draws: Sequence[Draws], lengths: NDArray[np.int64]) -> None:
        rows, groups = self._rows, self._rows * self._cuts
        if self._drawing is None:
            sizes = (
                FLOAT * rows, INT * rows, FLOAT * rows, DOUBLE * rows * self._slots, FLOAT * rows * self._vocabulary,
                FLOAT * groups * WARPS, DOUBLE * groups,
            )  # fmt: skip
            self._drawing = _Drawing(*(self._new(size) for size in sizes))
        device, buffers = self._device, self._drawing
        device.write(buffers.temperature, np.array([one.temperature for one in draws], np.float32))
        device.write(buffers.top_k, np.array([one.top_k for one in draws], np.int32))
        device.write(buffers.limit, np.array([np.float32(1.0 - one.top_p) for one in draws], np.float32))
        uniform = np.zeros((rows, self._slots))
        for row, (one, first) in enumerate(zip(draws, lengths.tolist(), strict=True)):
            numbers = one.uniforms[: max(0, self._slots - first)]
            uniform[row, first : first + len(numbers)] = numbers
        device.write(buffers.uniform, uniform)


def choice_cuts(vocabulary: int, multiprocessors: int) -> int:
    """Returns the number of thread blocks among which a row's vocabulary is divided to choose the row's token."""
    return max(1, min(-(-vocabulary // (THREADS * LOGITS_OF_A_THREAD)), 2 * multiprocessors))


def _marked(ids: Sequence[NDArray[np.int64]], vocabulary: int) -> NDArray[np.uint8]:
    """Makes an array ``[B, V]``: 1 for the ids of each row, else 0."""
    marks = np.zeros((len(ids), vocabulary), np.uint8)
    for row, chosen in zip(marks, ids, strict=True):
        row[chosen] = 1
    return marks
