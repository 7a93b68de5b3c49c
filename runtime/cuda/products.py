"""Multiplies activations by weight matrices of the bundle: chooses the kernel, its grid and its parameter.

``kernels/gemv.cuh`` describes the computation for a few rows, ``gemm.cuh`` for more rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blip2edge.runtime.cuda.kernel import THREADS, WARP, Kernel, Launch, integers, pointers

SEGMENT = 64
"""Bytes of a weight row that neighbouring threads of a warp load together; equals ``SEGMENT`` in ``gemv.cuh``."""

MOST_ROWS = 4
"""Largest number of input rows for ``gemv.cuh``; for more rows, ``gemm.cuh`` is used."""

GEMM_ROWS, GEMM_COLUMNS, GEMM_DEPTH, GEMM_PITCH = 64, 64, 32, 40
"""Sizes in ``gemm.cuh``: input rows and columns of a thread block, rows of weights that it loads in one step, and the
distance between two rows in its shared memory, in fp16 values (``PITCH``)."""

GEMM_STEPS = 8
"""Number of steps (of :data:`GEMM_DEPTH` rows of weights) that K must have for each thread block along K."""

MOST_MATRICES = 3
CHUNK = 16
"""Number of rows of weights that a thread loads at a time; ``LEAST_BLOCK`` of ``weights.cuh``."""


class Matrix(ctypes.Structure):
    """The C++ structure ``Matrix`` of ``gemv.cuh``."""

    _fields_ = [*pointers("weight", "scales", "bias", "residual", "out"), *integers("width")]


class GemvArguments(ctypes.Structure):
    """The C++ structure ``GemvArguments`` of ``gemv.cuh``."""

    _fields_ = [
        ("matrices", Matrix * MOST_MATRICES),
        *pointers("x", "gated", "parts", "arrived"),
        *integers("depth", "block", "widest", "rows", "splits"),
    ]


@dataclass(frozen=True)
class RowProduct:
    """Sizes and types of a matrix multiplication ``[M, K] x [K, N]``; all multiplications of a launch share them.

    Attributes:
        bits: Bits of a weight: 16 (fp16), 8 or 4.
        rows: M, the number of input rows.
        depth: K, the number of rows of each matrix.
        widths: N, the number of columns, of each matrix.
        block: Number of rows of a matrix that share a scale; 0 for fp16.
        scale: C++ type of the scales.
        out: C++ type of the results.
        swiglu: Whether the input is ``silu(x) * gated``.
        relu: Whether ReLU follows the bias.
    """

    bits: Literal[4, 8, 16]
    rows: int
    depth: int
    widths: tuple[int, ...]
    block: int = 0
    scale: Literal["float", "__half"] = "__half"
    out: Literal["float", "__half"] = "__half"
    swiglu: bool = False
    relu: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or not 1 <= len(self.widths) <= MOST_MATRICES:
            raise ValueError(
                f"expected a row or more and 1 to {MOST_MATRICES} matrices, got {self.rows} and {len(self.widths)}"
            )
        if self.bits < 16 and (self.block % CHUNK or not self.block or self.depth % self.block):
            raise ValueError(
                f"expected blocks of a multiple of {CHUNK} rows that divide {self.depth} rows, got blocks of "
                f"{self.block} rows"
            )

    @property
    def few(self) -> bool:
        """Returns whether the kernel for at most :data:`MOST_ROWS` input rows is used."""
        return self.rows <= MOST_ROWS

    @property
    def load(self) -> int:
        """Returns the bytes of weights that a thread loads at once: the largest size to which all rows are aligned.

        With 4-bit weights and more than two input rows, a load has at most 8 bytes: 16 bytes would need more registers
        than a thread has.

        Raises:
            ValueError: A row has an odd number of 4-bit weights, so that the next row does not begin at a whole byte.
        """
        most = 8 if self.bits == 4 and self.rows > 2 else 16
        for size in (16, 8, 4, 2, 1):
            columns = size * 8 // self.bits
            if size <= most and columns and all(width % columns == 0 for width in self.widths):
                return size
        raise ValueError(f"there is no kernel for {self.bits}-bit matrices of the widths {self.widths}")

    @property
    def lanes(self) -> int:
        """Returns how many threads of a warp load neighbouring columns; its other threads load other rows."""
        return min(SEGMENT // self.load, WARP) if self.few else WARP

    @property
    def tile(self) -> int:
        """Returns the number of columns that a thread block computes."""
        return self.lanes * self.load * 8 // self.bits if self.few else GEMM_COLUMNS

    @property
    def tiles(self) -> int:
        """Returns the number of thread blocks along the columns of the widest matrix."""
        return -(-max(self.widths) // self.tile)

    @property
    def row_tiles(self) -> int:
        """Returns the number of thread blocks along the input rows."""
        return 1 if self.few else -(-self.rows // GEMM_ROWS)

    @property
    def counters(self) -> int:
        """Returns the number of uint32 counters: for each tile, how many thread blocks along K have finished."""
        return self.tiles * self.row_tiles * len(self.widths)

    def splits(self, multiprocessors: int) -> int:
        """Returns the number of thread blocks along K.

        It is chosen so that the launch has about two blocks for each multiprocessor, or fewer if K is small.

        Args:
            multiprocessors: Number of the GPU's multiprocessors.
        """
        most = -(-self.depth // (CHUNK * THREADS // self.lanes if self.few else GEMM_DEPTH * GEMM_STEPS))
        wanted = -(-2 * multiprocessors // (self.tiles * self.row_tiles * len(self.widths)))
        return max(1, min(most, wanted))

    def parts_bytes(self, splits: int) -> int:
        """Returns the bytes of the buffer for the partial sums of the thread blocks along K."""
        return 4 * len(self.widths) * splits * self.rows * max(self.widths) if splits > 1 else 0

    @property
    def kernel(self) -> Kernel:
        """Returns the kernel for these sizes and types."""
        kinds = ("SWIGLU" if self.swiglu else "PLAIN", "RELU" if self.relu else "LINEAR")
        if self.few:
            sizes = (str(self.bits), str(self.rows), str(self.load))
            shared = THREADS // WARP * self.rows * self.tile * 4
            return Kernel("gemv.cuh", "gemv", (*sizes, self.scale, self.out, *kinds), GemvArguments, shared)
        shared = (GEMM_ROWS + GEMM_COLUMNS) * GEMM_PITCH * 2
        return Kernel("gemm.cuh", "gemm", (str(self.bits), self.scale, self.out, *kinds), GemvArguments, shared)

    def launch(
        self, matrices: Sequence[Matrix], x: int, parts: int, arrived: int, splits: int, gated: int = 0
    ) -> Launch:
        """Makes the kernel launch for the multiplications.

        Args:
            matrices: Addresses of each matrix; this method sets their ``width``.
            x: Address of the input, fp16 ``[M, K]``.
            parts: Address of a buffer of :meth:`parts_bytes` bytes for partial sums.
            arrived: Address of :attr:`counters` counters, uint32, which are zero.
            splits: Number of thread blocks along K.
            gated: Address of the second input of SwiGLU; 0 without SwiGLU.
        """
        arguments = GemvArguments(
            x=x, gated=gated, parts=parts, arrived=arrived,
            depth=self.depth, block=self.block, widest=max(self.widths), rows=self.rows, splits=splits,
        )  # fmt: skip
        for index, (matrix, width) in enumerate(zip(matrices, self.widths, strict=True)):
            matrix.width = width
            arguments.matrices[index] = matrix
        grid = (self.tiles, self.row_tiles * splits, len(self.widths))
        return Launch(self.kernel, grid, arguments, self.parts_bytes(splits), self.counters)
