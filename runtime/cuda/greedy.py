"""Greedy decoding on the GPU: each step chooses a token and copies the token's embedding for the next step.

So the kernel launches have the same parameters in every step, and no kernel waits for the host.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.safetensors_file import SafetensorsFile
from blip2edge.bundle.schema import CacheSpec, GraphSpec
from blip2edge.bundle.token_table import COLUMNS, ROWS, SCALE, TokenTable
from blip2edge.errors import BundleError, option
from blip2edge.runtime.cuda.kernel import THREADS, Launch
from blip2edge.runtime.cuda.plan import FLOAT, INT, RunBuffers, RunSizes, new_buffers, plan_run
from blip2edge.runtime.cuda.session import KernelBuffers, KernelSession
from blip2edge.runtime.cuda.steps import BEST_BYTES, ChooseArguments, choose_kernel
from blip2edge.runtime.cuda.weights import KernelDevice
from blip2edge.runtime.decoding.kv.in_place import InPlaceDecoder, InPlaceState
from blip2edge.runtime.decoding.sampling import StepScores, broken_logits
from blip2edge.runtime.decoding.state import GreedyStep

LOGITS_OF_A_THREAD = 4
FORMS = {ROWS: "ROWS_OF_INTEGERS", COLUMNS: "COLUMNS_OF_INTEGERS"}
FLOATS = {"F32": ("float", 32), "F16": ("__half", 16)}


@dataclass(frozen=True)
class TableOnDevice:
    """The token embedding table on the GPU, in the format of the bundle.

    Attributes:
        form: Format of the table, one of :data:`blip2edge.runtime.cuda.steps.TABLES`.
        bits: Bits of a value.
        value: C++ type of the floats or scales.
        address: Address of the values.
        scales: Address of the scales; 0 for floats.
        block: Number of neighbouring values of an embedding that share a scale; 0 for floats.
    """

    form: str
    bits: int
    value: str
    address: int
    scales: int = 0
    block: int = 0


def load_table(path: Path, tensor: str, device: KernelDevice) -> TableOnDevice:
    """Copies a token embedding table to the GPU.

    Args:
        path: The safetensors file; :class:`blip2edge.bundle.token_table.TokenTable` has checked it.
        tensor: The tensor's name.
        device: The GPU.

    Raises:
        BundleError: The table is in bf16.
    """
    file = SafetensorsFile(path)

    def put(values: Array) -> int:
        address = device.allocate(values.nbytes)
        device.write(address, values)
        return address

    if "bits" in file.metadata:
        scales = file.array(tensor + SCALE)
        value = "__half" if scales.dtype == np.float16 else "float"
        bits, block = int(file.metadata["bits"]), int(file.metadata["block"])
        return TableOnDevice(FORMS[file.metadata["layout"]], bits, value, put(file.array(tensor)), put(scales), block)
    dtype = file.stored(tensor).dtype
    if dtype not in FLOATS:
        raise BundleError(
            f"expected a token table in fp32, fp16 or integers, got {dtype}", f"export with {option('precision')} fp16"
        )
    value, bits = FLOATS[dtype]
    return TableOnDevice("FLOATS", bits, value, put(file.array(tensor)))


class KernelDecoder(InPlaceDecoder):
    """A decoder that runs as CUDA kernels and can choose greedy tokens on the GPU.

    Args:
        session: The decoder on the GPU.
        spec: Inputs and outputs of the exported (not optimized) decoder graph.
        cache: Names and sizes of the key and value tensors of the exported graph.
        table: The token embedding table on the host.
        max_positions: The longest context, in tokens.
        stored: The token embedding table on the GPU.
    """

    def __init__(
        self,
        session: KernelSession,
        spec: GraphSpec,
        cache: CacheSpec,
        table: TokenTable,
        max_positions: int,
        stored: TableOnDevice,
    ) -> None:
        super().__init__(session, spec, cache, table, max_positions)
        self.kernels, self.stored = session, stored

    def _new_state(self, rows: int, slots: int) -> KernelState:
        return KernelState(self, rows, slots)


class KernelState(InPlaceState):
    """The decoding state of a batch on a GPU; see :class:`blip2edge.runtime.decoding.state.GreedyState`."""

    _decoder: KernelDecoder
    _buffers: KernelBuffers

    @property
    def gives_logprobs(self) -> bool:
        """Returns True: these kernels always output log-probabilities; see :class:`GreedyState`."""
        return True

    def greedy(self, token_ids: NDArray[np.int64], rules: Sequence[StepScores]) -> Generator[GreedyStep, None, None]:
        """Yields the likeliest next tokens ``[B]`` and their log-probabilities ``[B]`` step by step.

        Args:
            token_ids: The last token of each row, ``[B]``.
            rules: How the logits of each row are changed before its token is chosen.

        Raises:
            BackendError: The logits of a row contain NaN.
        """
        with self._marks(rules) as marks:
            while True:
                self._make_room(self.batch_size, int(self.lengths.max()) + 1)
                for tokens, logprobs in self._until_full(token_ids, marks):
                    token_ids = tokens
                    yield tokens, logprobs

    def _until_full(self, token_ids: NDArray[np.int64], marks: _Marks) -> Generator[GreedyStep, None, None]:
        """Yields tokens until the last slot of the cache is written."""
        decoder, kernels, rows = self._decoder, self._decoder.kernels, self.batch_size
        device, start, capacity = kernels.device, self.lengths.copy(), self._buffers.size[1]
        sizes = RunSizes(rows, 1, 1, capacity)
        buffers = new_buffers(device, kernels.weights, sizes)
        try:
            embeds = decoder.embed(token_ids[:, None])
            device.write(buffers.embeddings, np.ascontiguousarray(embeds, np.float32))
            device.write(buffers.before, start.astype(np.int32))
            device.write(buffers.fresh, np.ones(rows, np.int32))
            device.write(buffers.chosen, np.arange(rows, dtype=np.int32))
            cache = self._buffers.addresses(0)
            first, *launches = plan_run(kernels.weights, sizes, buffers, cache, device.multiprocessors)
            launches.append(self._choice(buffers, marks))
            device.run(first)
            for given in range(1, capacity - int(start.max()) + 1):
                for launch in launches:
                    device.run(launch)
                tokens = device.read(marks.tokens, (rows,), np.int32).astype(np.int64)
                logprobs = device.read(marks.logprobs, (rows,), np.float32)
                if tokens.min() < 0:
                    raise broken_logits()
                self.lengths = start + given
                yield tokens, logprobs
        finally:
            for address in buffers.addresses:
                device.free(address)

    def _choice(self, buffers: RunBuffers, marks: _Marks) -> Launch:
        weights, table = self._decoder.kernels.weights, self._decoder.stored
        layout, rows = weights.layout, self.batch_size
        arguments = ChooseArguments(
            buffers.logits, marks.seen, marks.penalty, marks.held, marks.held_steps, buffers.before,
            marks.tokens, marks.logprobs, table.address, table.scales, weights.positions, buffers.x,
            marks.parts, marks.arrived, layout.vocabulary, layout.width, table.block, layout.position_offset,
            layout.positions.shape[0] if layout.positions is not None else 0,
        )  # fmt: skip
        return Launch(choose_kernel(table.form, table.bits, table.value), (marks.cuts, rows, 1), arguments)

    @contextmanager
    def _marks(self, rules: Sequence[StepScores]) -> Iterator[_Marks]:
        """Makes the buffers for choosing tokens by these rules; frees them at the end of the block."""
        kernels, rows = self._decoder.kernels, self.batch_size
        device, vocabulary = kernels.device, kernels.weights.layout.vocabulary
        cuts = max(1, min(-(-vocabulary // (THREADS * LOGITS_OF_A_THREAD)), 2 * device.multiprocessors))
        sizes = (
            rows * vocabulary, FLOAT * rows, rows * vocabulary, INT * rows, INT * rows, FLOAT * rows,
            BEST_BYTES * rows * cuts, INT * rows,
        )  # fmt: skip
        marks = _Marks(cuts, *(device.allocate(size) for size in sizes))
        try:
            held = [rule.held if rule.held_steps > 0 else rule.held[:0] for rule in rules]
            device.write(marks.seen, _marked([rule.seen for rule in rules], vocabulary))
            device.write(marks.held, _marked(held, vocabulary))
            device.write(marks.penalty, np.array([rule.penalty for rule in rules], np.float32))
            device.write(marks.held_steps, np.array([rule.held_steps for rule in rules], np.int32))
            yield marks
        finally:
            for address in marks.addresses():
                device.free(address)


@dataclass(frozen=True)
class _Marks:
    """Addresses of the buffers for choosing tokens, in the order of ``ChooseArguments``."""

    cuts: int
    seen: int
    penalty: int
    held: int
    held_steps: int
    tokens: int
    logprobs: int
    parts: int
    arrived: int

    def addresses(self) -> list[int]:
        return [value for name, value in vars(self).items() if name != "cuts"]


def _marked(ids: Sequence[NDArray[np.int64]], vocabulary: int) -> NDArray[np.uint8]:
    """Makes an array ``[B, V]``: 1 for the ids of each row, else 0."""
    marks = np.zeros((len(ids), vocabulary), np.uint8)
    for row, chosen in zip(marks, ids, strict=True):
        row[chosen] = 1
    return marks
