"""Predicts a decode step and the prefill of ``cuda-decoder``: bytes, launches and operations, by board.

Nothing was measured. A step reads its bytes at a share of the board's bandwidth; each of its launches adds a fixed
time, in which no weights are read. The prefill multiplies all tokens by each matrix on tensor cores: its operations or
the reading of the weights count, whichever takes longer, and its launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from blip2edge.bundle.schema import DECODER
from blip2edge.runtime.bench.devices import Board
from blip2edge.runtime.bench.plan import PlanOptions
from blip2edge.runtime.cuda.layout import DecoderLayout
from blip2edge.runtime.cuda.plan import FLOAT, HALF, step_launches
from blip2edge.runtime.cuda.products import GEMM_ROWS
from blip2edge.shapes.model_shape import AttentionProducts, ModelPart, ModelShape, TokenCounts, WeightMatrix

FORMATS: Mapping[str, str] = {"fp16": "fp16", "int8": "int8", "int4": "int4"}
"""Precisions of a bundle, each with the format of the weights on the GPU. The kernels round fp32 to fp16."""

BLOCKS: Mapping[str, tuple[int, ...]] = {"int8": (64, 32, 16), "int4": (128, 64, 32, 16)}
"""Numbers of rows that share a scale in a calibrated bundle; the first that divides the rows of a matrix is used."""

INTEGER_BYTES: Mapping[str, float] = {"int8": 1.0, "int4": 0.5}

LAUNCH_S = 2e-6
"""Assumed seconds from the end of a kernel's reads to the first reads of the next kernel of a CUDA graph."""

PRODUCT_SHARE = 0.25
"""Assumed share of the peak rate of the tensor cores that ``gemm.cuh`` reaches: it does not load ahead."""

HALF_RATE = ("rtx-4060", "rtx-4090")
"""Boards whose tensor cores have half of their fp16 rate if sums are in fp32, as those of ``gemm.cuh`` are; NVIDIA Ada
architecture whitepaper, appendix A."""


@dataclass(frozen=True)
class KernelStep:
    """A decode step and the prefill in one precision.

    Attributes:
        precision: Precision of the bundle.
        bytes: Bytes of weights, keys and values that the step reads, in the middle of the caption; see
            :func:`blip2edge.runtime.cuda.plan.step_bytes`.
        launches: Number of kernels of the step, all of them in one CUDA graph.
        least_ms: Milliseconds to read the bytes at the board's full bandwidth: a bound, not a measured time.
        step_ms: Predicted milliseconds of the step.
        prefill_tokens: Number of tokens of the prompt, visual tokens included.
        prefill_ms: Predicted milliseconds of the prefill.
    """

    precision: str
    bytes: int
    launches: int
    least_ms: float
    step_ms: float
    prefill_tokens: int
    prefill_ms: float

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for ``plan --json``."""
        times = {name: round(getattr(self, name), 3) for name in ("least_ms", "step_ms", "prefill_ms")}
        return {**vars(self), **times, "measured": False}


@dataclass(frozen=True)
class KernelShape:
    """Sizes of a model with the matrices that ``cuda-decoder`` reads.

    Attributes:
        shape: Sizes of the model's layers.
        reason: Why there are no kernels for the decoder; empty if there are.
    """

    shape: ModelShape
    reason: str = ""


def known_shape(shape: ModelShape) -> KernelShape:
    """Returns the sizes that a config gives, with the reason if there are no kernels for such a decoder."""
    if shape.decoder.kernels:
        return KernelShape(shape)
    if shape.cache.cross:
        return KernelShape(shape, "it has cross-attention")
    return KernelShape(shape, "its layers have another form than those of OPT and Llama")


def decoder_part(layout: DecoderLayout) -> ModelPart:
    """Returns the sizes of the matrices of a layout; norms and positions are left out."""
    matrices = [
        WeightMatrix("matrix", depth, width, "steps", bias=matrix.bias is not None)
        for matrix, depth, width in layout.matrices()
    ]
    head = replace(matrices.pop(), name="head", rows="asked")
    attention = AttentionProducts(layout.heads * layout.head_dim, layout.heads, "steps", "context", len(layout.layers))
    return ModelPart(DECODER, (*matrices, head), (attention,), kernels=True)


def held_on_gpu(decoder: ModelPart, precision: str) -> float:
    """Returns the bytes of all matrices and biases in the GPU's memory; a step reads each of them once.

    Biases are in fp32 there. Norms and the row of positions are not counted: they are too small.

    Args:
        decoder: Sizes of the decoder.
        precision: A key of :data:`FORMATS`.
    """
    return sum(
        matrix.weights * _bytes_each(matrix, precision) + (matrix.parameters - matrix.weights) * FLOAT
        for matrix in decoder.matrices
    )


def _bytes_each(matrix: WeightMatrix, precision: str) -> float:
    """Returns the bytes of a weight with its share of a scale in fp16, as in a bundle that was calibrated from fp16.

    A matrix with an odd number of columns is in INT8 in place of INT4, and one that no block divides is in fp16.
    """
    if precision == "int4" and matrix.outputs % 2:
        precision = "int8"
    block = next((size for size in BLOCKS.get(precision, ()) if matrix.inputs % size == 0), 0)
    return INTEGER_BYTES[precision] + HALF / block if block else HALF


def kernel_steps(shape: ModelShape, device: Board, options: PlanOptions) -> tuple[KernelStep, ...]:
    """Predicts the step and the prefill in each precision; empty for a CPU, and for decoders without kernels.

    Args:
        shape: Sizes of the model's layers.
        device: The board.
        options: Lengths of the prompt and of the caption.
    """
    if device.is_cpu or not shape.decoder.kernels:
        return ()
    tokens = shape.tokens(options.frames or shape.frames, options.prompt_tokens)
    context = tokens["context"] + 1 + (options.new_tokens - 1) // 2
    cache = shape.cache.bytes(context, 0, HALF)
    launches = step_launches(shape.cache.layers)
    steps = []
    for precision, weights in FORMATS.items():
        held, rate = held_on_gpu(shape.decoder, precision), device.bytes_per_s * device.efficiency.bytes[weights]
        size = int(held + cache)
        steps.append(
            KernelStep(
                precision=precision,
                bytes=size,
                launches=launches,
                least_ms=size / device.bytes_per_s * 1e3,
                step_ms=(size / rate + launches * LAUNCH_S) * 1e3,
                prefill_tokens=tokens["steps"],
                prefill_ms=(prefill_seconds(shape.decoder, device, tokens, held / rate) + launches * LAUNCH_S) * 1e3,
            )
        )
    return tuple(steps)


def prefill_seconds(decoder: ModelPart, device: Board, tokens: TokenCounts, reading_s: float) -> float:
    """Predicts the prefill without its launches; see :func:`prefill_parts`."""
    products, reading, attention = prefill_parts(decoder, device, tokens, reading_s)
    return max(products, reading) + attention


def prefill_parts(
    decoder: ModelPart, device: Board, tokens: TokenCounts, reading_s: float
) -> tuple[float, float, float]:
    """Predicts the seconds of the prefill's products, of reading the weights for them, and of its attention.

    A block of ``gemm.cuh`` multiplies :data:`GEMM_ROWS` tokens, also if there are fewer, and reads its weights for
    them. Attention computes in fp32, outside of the tensor cores.

    Args:
        decoder: Sizes of the decoder.
        device: The board.
        tokens: Numbers of tokens.
        reading_s: Seconds to read all weights once.
    """
    blocks = -(-tokens["steps"] // GEMM_ROWS)
    padded = {**tokens, "steps": blocks * GEMM_ROWS}
    products = sum(matrix.operations(padded) for matrix in decoder.matrices) / tensor_rate(device)
    fp32_rate = device.rate("fp32") * device.efficiency.products["fp32"]
    attention = sum(one.operations(tokens) for one in decoder.attentions) / fp32_rate
    return products, blocks * reading_s, attention


def tensor_rate(device: Board) -> float:
    """Returns the assumed operations a second of ``gemm.cuh``."""
    return device.rate("fp16") * PRODUCT_SHARE / (2 if device.name in HALF_RATE else 1)
