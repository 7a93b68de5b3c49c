"""Quantizes weights only: they become integers of four or eight bits, so that a decoder reads fewer bytes per token.

    integers [K, N] --+
    scales [K/b, N] --+-> DequantizeLinear -> weight [K, N] -> MatMul, in floating point

ONNX Runtime fuses the two nodes into MatMulNBits when it loads the graph, TensorRT into a weight-only multiplication.
Matrices are identified by the initializer's name, so that a second graph with the same weights can use them too.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.calibration.formats import KEPT, GraphFormat
from blip2edge.calibration.initializers import (
    add_initializer,
    initializer_tensor,
    replace_by_dequantize,
)
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import Product
from blip2edge.calibration.weights.blocks import (
    BlockFormat,
    Floats,
    Integers,
    packed,
    plain_scales,
    restored,
    searched_scales,
)
from blip2edge.calibration.weights.gptq import GptqRounder, Scales, SecondMoments, nearest
from blip2edge.calibration.weights.segments import SegmentRunner

Array = NDArray[Any]

OPSET = 21
"""The first opset whose DequantizeLinear has blocks and 4-bit types. All other operators of the exported graphs mean
the same in opset 21 as in opset 18, because the versions between only added types."""

DTYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
LOGITS_INDICES = "logits_indices"


@dataclass(frozen=True)
class BlockMatrix:
    """A quantized matrix in a file.

    Attributes:
        name: Name of the initializer that the matrix replaces.
        form: The integer format.
        integers: Integers ``[K, N]``.
        scales: Scales ``[K / block, N]``.
        error: Relative change of the matrix's output that rounding causes, on the recorded activations; None if no
            activations were recorded.
        plain_error: The same relative change if the matrix is rounded to nearest with plain scales, as a baseline.
    """

    name: str
    form: BlockFormat
    integers: ir.ExternalTensor
    scales: ir.ExternalTensor
    error: float | None = None
    plain_error: float | None = None


MatrixWriter = Callable[[Product, BlockFormat, Integers, Floats], tuple[ir.ExternalTensor, ir.ExternalTensor]]
"""Function that writes the integers and scales of a matrix; it returns the tensors to which the graph refers."""


def choose_formats(
    products: Sequence[Product], graph_format: GraphFormat
) -> tuple[dict[str, BlockFormat], dict[str, str]]:
    """Chooses the integer format of each matrix of a graph.

    Args:
        products: The matrix multiplications of the graph.
        graph_format: The format of the graph, and the formats of single matrices.

    Returns:
        The formats by the weight's name, and the weights kept in floating point, with the reason.
    """
    formats: dict[str, BlockFormat] = {}
    kept_float: dict[str, str] = {}
    for product in products:
        wanted = graph_format.of(product.weight)
        form = wanted.for_width(product.inner)
        if form is None and wanted.bits is None:
            kept_float[product.weight] = KEPT
        elif form is None:
            kept_float[product.weight] = f"its {product.inner} inputs cannot be cut into blocks of 16 or more"
        else:
            formats[product.weight] = form
    return formats, kept_float


def quantize_matrices(
    model: ir.Model,
    products: Sequence[Product],
    data: DataFile,
    formats: Mapping[str, BlockFormat],
    feeds: Sequence[Mapping[str, Array]] = (),
    *,
    plain: bool = False,
    threads: int | None = None,
    writers: Mapping[str, MatrixWriter] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, BlockMatrix]:
    """Rounds the matrices of a graph, writes every weight to a new file and changes the graph.

    Args:
        model: The original graph, its initializers external; changed in place. At a time, only one matrix and the
            outputs of one segment of the graph (for all ``feeds``) are in memory.
        products: The graph's matrix multiplications (``find_targets``).
        data: The new file of the weights.
        formats: Integer format of each matrix, by the initializer's name; other matrices are kept in floating point.
        feeds: Recorded inputs of some runs; empty to round without activations.
        plain: Whether to round to nearest with plain scales and without activations, as a baseline.
        threads: CPU threads of the runs that compute activations.
        writers: Functions that write matrices to other files than ``data``, by the initializer's name.
        progress: Called with matrices done and matrices in all.

    Returns:
        The quantized matrices, by the initializer's name.
    """
    wanted = list({product.weight: product for product in products if product.weight in formats}.values())
    scales_of = plain_scales if plain else searched_scales
    rounder = _MatrixRounder(model.graph.initializers, data, formats, writers or {}, scales_of)
    report = progress or (lambda done, total: None)
    if plain or not feeds:
        for product in wanted:
            rounder.round(product, None)
            report(len(rounder.done), len(wanted))
    else:
        runner = SegmentRunner(model, wanted, [all_logits(feed) for feed in feeds], threads)
        for activation, values in runner:
            group = [product for product in wanted if product.activation == activation]
            moments = SecondMoments(group[0].inner)
            for value in values:
                moments.add(value)
            gptq = GptqRounder(moments.mean())
            for product in group:
                runner.replace(product.weight, rounder.round(product, gptq))
                report(len(rounder.done), len(wanted))
    copy_others(model, data, rounder.done)
    replace_weights(model, rounder.done)
    return rounder.done


def copy_others(model: ir.Model, data: DataFile, but: Container[str]) -> None:
    """Copies the external initializers to ``data``, except those named in ``but``.

    Small initializers are stored in the graph's own file and stay there.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if name not in but and isinstance(tensor, ir.ExternalTensor):
            value.const_value = data.copy(name, tensor)


@dataclass
class _MatrixRounder:
    """Rounds matrices and writes them.

    Attributes:
        initializers: Initializers of the graph.
        data: The file of the weights.
        formats: Each matrix's format, by the initializer's name.
        writers: Functions that write matrices to other files than ``data``, by the initializer's name.
        scales_of: Computes the scales of a matrix that is rounded without activations.
        done: The matrices that were rounded so far, by the initializer's name.
    """

    initializers: Mapping[str, ir.Value]
    data: DataFile
    formats: Mapping[str, BlockFormat]
    writers: Mapping[str, MatrixWriter]
    scales_of: Scales
    done: dict[str, BlockMatrix] = field(default_factory=dict)

    def round(self, product: Product, gptq: GptqRounder | None) -> Array:
        """Rounds and writes one matrix; returns the rounded weights in floating point, in the graph's type.

        Args:
            product: The matrix multiplication with this matrix.
            gptq: Rounds by GPTQ on recorded activations; None to round to nearest.
        """
        form = self.formats[product.weight]
        given = initializer_tensor(self.initializers[product.weight]).numpy()
        weight = np.asarray(given, np.float32)
        error = plain_error = None
        if gptq is None:
            integers, scales = nearest(weight, form, self.scales_of)
        else:
            integers, scales = gptq.quantize(weight, form)
        scales = scales.astype(given.dtype)
        if gptq is not None:
            error = gptq.error(weight, integers, scales, form)
            plain_error = gptq.error(weight, *nearest(weight, form, plain_scales), form)
        write = self.writers.get(product.weight, self._write)
        self.done[product.weight] = BlockMatrix(
            product.weight, form, *write(product, form, integers, scales), error, plain_error
        )
        return restored(integers, scales, form).astype(given.dtype)

    def _write(
        self, product: Product, form: BlockFormat, integers: Integers, scales: Floats
    ) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        name = f"{product.weight}.int{form.bits}"
        bytes_ = packed(integers, form.bits).tobytes()
        return (
            self.data.add_bytes(name, bytes_, DTYPES[form.bits], integers.shape),
            self.data.add(f"{product.weight}.scale", scales),
        )


def replace_weights(model: ir.Model, matrices: Mapping[str, BlockMatrix]) -> None:
    """Replaces initializers by integers, scales and a DequantizeLinear node; a name that the graph lacks is ignored."""
    graph = model.graph
    for name, matrix in matrices.items():
        if name in graph.initializers:
            inputs = [add_initializer(graph, tensor) for tensor in (matrix.integers, matrix.scales)]
            replace_by_dequantize(graph, name, inputs, {"axis": 0, "block_size": matrix.form.block})
    if matrices:
        graph.opset_imports[""] = max(graph.opset_imports[""], OPSET)
        model.ir_version = max(model.ir_version, 10)


def block_tensors(initializers: Mapping[str, ir.Value], weight: str) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
    """Returns the integers and scales of the matrix ``weight`` in a quantized graph.

    Raises:
        ValueError: The matrix is not quantized.
    """
    found = [initializers.get(f"{weight}.{kind}") for kind in ("int4", "int8", "scale")]
    tensors = [value.const_value for value in found if value is not None]
    integers, scales = tensors if len(tensors) == 2 else (None, None)
    if not isinstance(integers, ir.ExternalTensor) or not isinstance(scales, ir.ExternalTensor):
        raise ValueError(f"{weight} is not quantized in blocks: it has no integers with scales in external data")
    return integers, scales


def form_of(integers: ir.ExternalTensor, scales: ir.ExternalTensor) -> BlockFormat:
    """Returns the format of a matrix, from the type of the integers and the shapes of integers and scales."""
    bits = 4 if integers.dtype == ir.DataType.INT4 else 8
    return BlockFormat(bits, integers.shape.numpy()[0] // scales.shape.numpy()[0])


def all_logits(feed: Mapping[str, Array]) -> dict[str, Array]:
    """Changes a decoder's inputs to request logits at every position, so that a run gives many activations of the head.

    If the decoder has no input ``logits_indices``, the inputs are returned unchanged.
    """
    indices, embeds = feed.get(LOGITS_INDICES), feed.get("inputs_embeds")
    if indices is None or embeds is None:
        return dict(feed)
    batch, steps = embeds.shape[:2]
    every = np.broadcast_to(np.arange(steps, dtype=indices.dtype), (batch, steps))
    return {**feed, LOGITS_INDICES: np.ascontiguousarray(every)}
