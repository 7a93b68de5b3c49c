"""Weights alone as integers of four or eight bits: what a decoder reads for every token becomes a fraction.

    integers [K, N] --+
    scales [K/b, N] --+-> DequantizeLinear -> weight [K, N] -> MatMul, in floating point

ONNX Runtime fuses the two nodes to MatMulNBits when it loads the graph; TensorRT to a weight-only product. A matrix
is known by its initializer's name, so that a second graph over the same weights is changed alike.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.calibration.activations.segments import PieceRunner
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import Product, held
from blip2edge.calibration.weights.blocks import (
    BlockFormat,
    Floats,
    Integers,
    packed,
    plain_scales,
    restored,
    searched_scales,
)
from blip2edge.calibration.weights.gptq import Corrector, SecondMoments, nearest

Array = NDArray[Any]

OPSET = 21
"""The first whose DequantizeLinear has blocks and 4-bit types. Nothing else in our graphs reads otherwise in it
than in 18: the operators between gained types only."""

DTYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
LOGITS_INDICES = "logits_indices"


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix in its file.

    Attributes:
        name: The initializer that it replaces.
        form: Its format.
        integers: ``[K, N]``.
        scales: ``[K / block, N]``.
        error: Share of its output that rounding changed on the calibration's activations; None where none were seen.
        plain_error: The same for rounding to the nearest with plain scales.
    """

    name: str
    form: BlockFormat
    integers: ir.ExternalTensor
    scales: ir.ExternalTensor
    error: float | None = None
    plain_error: float | None = None


Store = Callable[[Product, BlockFormat, Integers, Floats], tuple[ir.ExternalTensor, ir.ExternalTensor]]
"""Writes a matrix; the tensors that refer to it."""


@dataclass(frozen=True)
class WeightOnly:
    """How the matrices of a graph are rounded.

    Attributes:
        formats: Each matrix's format, by the initializer's name; others stay as they are.
        plain: Round to the nearest with plain scales, and look at no activations: what others are compared with.
        threads: CPU threads of the runs that collect activations.
    """

    formats: Mapping[str, BlockFormat]
    plain: bool = False
    threads: int | None = None


def choose_formats(products: Sequence[Product], bits: int) -> tuple[dict[str, BlockFormat], dict[str, str]]:
    """The formats of a graph's matrices, and those that stay as they are, with the reason."""
    formats: dict[str, BlockFormat] = {}
    left: dict[str, str] = {}
    for product in products:
        form = BlockFormat.for_width(product.inner, bits)
        if form is None:
            left[product.weight] = f"its {product.inner} inputs cannot be cut into blocks of 16 or more"
        else:
            formats[product.weight] = form
    return formats, left


def quantize_weights(
    model: ir.Model,
    products: Sequence[Product],
    data: DataFile,
    how: WeightOnly,
    feeds: Sequence[Mapping[str, Array]] = (),
    *,
    store: Mapping[str, Store] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Matrix]:
    """Rounds the matrices of a graph, writes every weight to a new file and changes the graph.

    Args:
        model: The parent's graph, its initializers external; changed in place. One matrix is in memory at a time,
            and what a piece of the graph gives for all feeds.
        products: Its products (``find_targets``).
        data: Where the weights go.
        how: What becomes of which matrix.
        feeds: Inputs of some runs; none for rounding without activations.
        store: What writes a matrix elsewhere than to ``data``, by the initializer's name.
        progress: Called with matrices done and matrices in all.

    Returns:
        What was quantised, by the initializer's name.
    """
    wanted = list({product.weight: product for product in products if product.weight in how.formats}.values())
    stores = store or {}
    writer = _Writer(model, data, how, stores, len(wanted), progress)
    if how.plain or not feeds:
        for product in wanted:
            writer.write(product, None)
    else:
        runner = PieceRunner(model, wanted, [all_logits(feed) for feed in feeds], how.threads)
        for activation, values in runner:
            group = [product for product in wanted if product.activation == activation]
            moments = SecondMoments(group[0].inner)
            for value in values:
                moments.add(value)
            corrector = Corrector(moments.mean())
            for product in group:
                runner.replace(product.weight, writer.write(product, corrector))
    copy_others(model, data, writer.done)
    replace_weights(model, writer.done)
    return writer.done


def copy_others(model: ir.Model, data: DataFile, but: Container[str]) -> None:
    """Writes the external initializers that stay as they are; small ones lie in the graph's own file."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if name not in but and isinstance(tensor, ir.ExternalTensor):
            value.const_value = data.copy(name, tensor)


class _Writer:
    """Rounds matrices and writes them."""

    def __init__(
        self,
        model: ir.Model,
        data: DataFile,
        how: WeightOnly,
        stores: Mapping[str, Store],
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.initializers = model.graph.initializers
        self.data = data
        self.how = how
        self.stores = stores
        self.total = total
        self.progress = progress
        self.done: dict[str, Matrix] = {}

    def write(self, product: Product, corrector: Corrector | None) -> Array:
        """Rounds one; what the graph will compute of it, in the graph's type."""
        form = self.how.formats[product.weight]
        kept = held(self.initializers[product.weight]).numpy()
        weight = np.asarray(kept, np.float32)
        error = plain_error = None
        if corrector is None:
            integers, scales = nearest(weight, form, plain_scales if self.how.plain else searched_scales)
        else:
            integers, scales = corrector.quantize(weight, form)
        scales = scales.astype(kept.dtype)
        if corrector is not None:
            error = corrector.error(weight, integers, scales, form)
            plain_error = corrector.error(weight, *nearest(weight, form, plain_scales), form)
        write = self.stores.get(product.weight, self._store)
        self.done[product.weight] = Matrix(
            product.weight, form, *write(product, form, integers, scales), error, plain_error
        )
        if self.progress is not None:
            self.progress(len(self.done), self.total)
        return restored(integers, scales, form).astype(kept.dtype)

    def _store(
        self, product: Product, form: BlockFormat, integers: Integers, scales: Floats
    ) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        name = f"{product.weight}.int{form.bits}"
        bytes_ = packed(integers, form.bits).tobytes()
        return (
            self.data.add_bytes(name, bytes_, DTYPES[form.bits], integers.shape),
            self.data.add(f"{product.weight}.scale", scales),
        )


def replace_weights(model: ir.Model, matrices: Mapping[str, Matrix]) -> None:
    """Puts a DequantizeLinear in the place of every initializer that is one of ``matrices``; others stay."""
    graph = model.graph
    for name, matrix in matrices.items():
        value = graph.initializers.get(name)
        if value is None:
            continue
        users = list(value.uses())
        parts = []
        for tensor in (matrix.integers, matrix.scales):
            part = ir.Value(
                name=tensor.name,
                shape=ir.Shape(tensor.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            graph.register_initializer(part)
            parts.append(part)
        node = ir.node(
            "DequantizeLinear",
            parts,
            attributes={"axis": 0, "block_size": matrix.form.block},
            name=f"{name}.dequantize",
        )
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{name}.float", value.shape, value.type
        graph.insert_before(users[0][0], node)
        for user, index in users:
            user.replace_input_with(index, output)
        del graph.initializers[name]
    if matrices:
        graph.opset_imports[""] = max(graph.opset_imports[""], OPSET)
        model.ir_version = max(model.ir_version, 10)


def block_tensors(
    initializers: Mapping[str, ir.Value], weight: str
) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
    """Integers and scales of a matrix in a graph whose weights are blocks of integers.

    Raises:
        ValueError: It has none.
    """
    found = [initializers.get(f"{weight}.{kind}") for kind in ("int4", "int8", "scale")]
    tensors = [value.const_value for value in found if value is not None]
    integers, scales = tensors if len(tensors) == 2 else (None, None)
    if not isinstance(integers, ir.ExternalTensor) or not isinstance(scales, ir.ExternalTensor):
        raise ValueError(f"{weight} is no matrix of blocks")
    return integers, scales


def form_of(integers: ir.ExternalTensor, scales: ir.ExternalTensor) -> BlockFormat:
    """The format, by the shapes."""
    bits = 4 if integers.dtype == ir.DataType.INT4 else 8
    return BlockFormat(bits, integers.shape.numpy()[0] // scales.shape.numpy()[0])


def all_logits(feed: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs with logits asked for at every slot, so that the head meets more than one a caption."""
    indices, embeds = feed.get(LOGITS_INDICES), feed.get("inputs_embeds")
    if indices is None or embeds is None:
        return dict(feed)
    batch, steps = embeds.shape[:2]
    every = np.broadcast_to(np.arange(steps, dtype=indices.dtype), (batch, steps))
    return {**feed, LOGITS_INDICES: np.ascontiguousarray(every)}
