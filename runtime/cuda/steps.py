"""The kernels of a decoder besides matrix multiplication: norm, attention, input of layer 1, choice of the token.

The sources in ``kernels/`` describe the computations and the fields of the structures.
"""

from __future__ import annotations

import ctypes

from blip2edge.runtime.cuda.kernel import THREADS, WARP, Kernel, integers, pointers

WARPS = THREADS // WARP
MOST_GROUP = 8
"""Largest number of query heads that a thread block of attention computes, because each thread keeps their sums in
registers."""

MOST_SHARED = (48 - 1) << 10
"""Bytes of shared memory that a thread block has on every GPU without a special setting: 48 KB, of which the system
uses 1 KB from compute capability 9.0 on."""

CHANNELS = 8
"""Number of channels of a head that one thread computes; equals ``CHANNELS`` in ``attention.cuh``."""

BEST_BYTES = 16
"""Bytes of the structure ``Best`` in ``choose.cuh``."""

LISTED = 1024
"""The most tokens that ``sample.cuh`` sorts for top-k and top-p."""

CANDIDATES_BYTES = 16 * LISTED + 8 * THREADS + 8 * WARPS + 24
"""Bytes of the structure ``Candidates`` in ``sample.cuh``."""


class NormArguments(ctypes.Structure):
    """The C++ structure ``NormArguments`` of ``norm.cuh``."""

    _fields_ = [*pointers("x", "weight", "bias", "rows", "out"), *integers("width"), ("epsilon", ctypes.c_float)]


class AttentionArguments(ctypes.Structure):
    """The C++ structure ``AttentionArguments`` of ``attention.cuh``."""

    _fields_ = [
        *pointers("query", "key", "value", "keys", "values", "rotation", "before", "fresh", "origins"),
        *pointers("out", "parts", "arrived"),
        *integers("rows", "steps", "heads", "shares", "capacity", "window"),
        ("scale", ctypes.c_float),
    ]


class EmbedArguments(ctypes.Structure):
    """The C++ structure ``EmbedArguments`` of ``embed.cuh``."""

    _fields_ = [
        *pointers("embeddings", "positions", "before", "x"),
        *integers("steps", "width", "offset", "longest"),
    ]


class ChooseArguments(ctypes.Structure):
    """The C++ structure ``ChooseArguments`` of ``choose.cuh``."""

    _fields_ = [
        *pointers("logits", "seen", "penalty", "held", "held_steps", "before", "tokens", "logprobs"),
        *pointers("table", "scales", "positions", "x", "parts", "arrived"),
        *integers("vocabulary", "width", "block", "offset", "longest"),
    ]


class SampleArguments(ctypes.Structure):
    """The C++ structure ``SampleArguments`` of ``sample.cuh``."""

    _fields_ = [
        ("choose", ChooseArguments),
        *pointers("temperature", "top_k", "limit", "uniform", "scores", "maxima", "masses"),
        *integers("slots"),
    ]


class MoveArguments(ctypes.Structure):
    """The C++ structure ``MoveArguments`` of ``move.cuh``."""

    _fields_ = [*pointers("source", "target", "origins"), *integers("rows", "heads", "pitch", "words", "used")]


NORMS = ("LAYER_NORM", "RMS_NORM")
TABLES = ("FLOATS", "ROWS_OF_INTEGERS", "COLUMNS_OF_INTEGERS")


def norm_kernel(kind: str) -> Kernel:
    """Returns the kernel that normalizes rows; ``kind`` is one of :data:`NORMS`."""
    return Kernel("norm.cuh", "norm", (kind,), NormArguments, 4 * WARPS)


def attention_kernel(width: int, group: int) -> Kernel:
    """Returns the kernel of attention over the cache.

    Args:
        width: d, width of a head.
        group: Number of query heads that a thread block computes, from :func:`heads_of_block`.

    Raises:
        ValueError: There is no kernel for these sizes.
    """
    if not fits_head(width) or not 1 <= group <= MOST_GROUP or part_bytes(width, group) * WARPS > MOST_SHARED:
        raise ValueError(f"there is no kernel for heads {width} wide in groups of {group} query heads")
    return Kernel(
        "attention.cuh", "attention", (str(width), str(group)), AttentionArguments, part_bytes(width, group) * WARPS
    )


def fits_head(width: int) -> bool:
    """Returns whether there are kernels of attention for heads of this width."""
    return width % CHANNELS == 0 and CHANNELS <= width <= CHANNELS * WARP


def heads_of_block(width: int, group: int) -> int:
    """Returns how many query heads a thread block of attention computes.

    The number is the largest divisor of ``group`` whose sums fit the registers and the shared memory.

    Args:
        width: d, width of a head.
        group: Number of query heads that share a head of keys and values.
    """
    most = min(MOST_GROUP, MOST_SHARED // (part_bytes(width, 1) * WARPS))
    return next(count for count in range(most, 0, -1) if group % count == 0)


def part_bytes(width: int, group: int) -> int:
    """Returns the bytes of a thread block's partial sums, for ``group`` query heads of ``width`` channels."""
    return 4 * group * (width + 2)


def move_kernel() -> Kernel:
    """Returns the kernel that copies rows of one KV cache to another one."""
    return Kernel("move.cuh", "move_rows", ("uint4",), MoveArguments, 0)


def embed_kernel(value: str) -> Kernel:
    """Returns the kernel that makes the first layer's input; ``value`` is ``float`` or ``__half``."""
    return Kernel("embed.cuh", "embed", (value,), EmbedArguments, 0)


def choose_kernel(table: str, bits: int, value: str) -> Kernel:
    """Returns the kernel that chooses the next token.

    Args:
        table: Format of the token embedding table, one of :data:`TABLES`.
        bits: Bits of one value of the table; 16 or 32 for floats.
        value: C++ type of the table's floats or scales.
    """
    return Kernel("choose.cuh", "choose", (table, str(bits), value), ChooseArguments, BEST_BYTES * WARPS)


def score_kernel() -> Kernel:
    """Returns the kernel that makes the scores from which :func:`sample_kernel` draws."""
    return Kernel("sample.cuh", "score_tokens", ("float",), SampleArguments, BEST_BYTES * WARPS)


def sample_kernel(table: str, bits: int, value: str) -> Kernel:
    """Returns the kernel that draws the next token; its arguments are those of :func:`choose_kernel`."""
    return Kernel("sample.cuh", "sample", (table, str(bits), value), SampleArguments, CANDIDATES_BYTES)
