"""Reads the layout of a decoder from its graph, for the CUDA kernels in ``runtime/cuda``.

First, the passes for the CUDA provider rewrite the graph to one standard structure: they check the mask by its values
(it must be causal), compute the tables of rotary positions, and fuse the norms. After that, the graph is a chain of
matrix multiplications (MatMul nodes), norms and additions. The chain is read from its end to its beginning. If a graph
has another structure, an error says what differs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from blip2edge.bundle.schema import CacheSpec
from blip2edge.errors import BundleError
from blip2edge.optimization.graph import Array, constant, operands, prepare, producer, with_bias
from blip2edge.optimization.passes.half import widen
from blip2edge.optimization.passes.norms import fuse_rms_norms
from blip2edge.optimization.passes.shared_cache import share_cache
from blip2edge.runtime.cuda.layout import DecoderLayout, LayerLayout, Stored, StoredMatrix, StoredNorm
from blip2edge.runtime.cuda.steps import fits_head

DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
}
NORMS = {"LayerNormalization": "LAYER_NORM", "SimplifiedLayerNormalization": "RMS_NORM"}


class _Unfit(Exception):  # noqa: N818 - it carries a reason to layout_of_graph, and never leaves it
    """Raised if the graph has another structure than expected; the text says where."""


class _OddRows(Exception):  # noqa: N818 - it carries a reason to layout_of_graph, and never leaves it
    """Raised for a 4-bit matrix whose rows have an odd length; the text names the matrix."""


def layout_of_graph(model: ir.Model, cache: CacheSpec, max_positions: int) -> DecoderLayout:
    """Reads the layout of an exported (not optimized) decoder.

    Args:
        model: The decoder's graph with its weights in data files; the graph is changed.
        cache: The decoder's KV cache.
        max_positions: The longest context in tokens.

    Raises:
        BundleError: There are no CUDA kernels for a decoder of this structure.
    """
    places = _places(model)
    prepare(model)
    widen(model)
    try:
        if not share_cache(model, cache, max_positions):
            raise _Unfit("its attention is not causal self-attention with plain, rotary or grouped heads")
        fuse_rms_norms(model)
        return _Reader(model, cache, places).layout()
    except _OddRows as error:
        raise BundleError(
            f"the CUDA kernels read 4-bit weights in pairs, but {error}",
            "calibrate again with --format 'decoder:*head*=int8' (for the head), or use another backend",
        ) from None
    except _Unfit as error:
        raise BundleError(
            f"expected a decoder of the OPT or Llama kind, which the CUDA kernels compute, but {error}",
            "use another backend",
        ) from None


def _places(model: ir.Model) -> dict[str, Stored]:
    """Returns the place of each initializer that is in a data file: file, offset, type and shape, by name."""
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype in DTYPES:
            shape = tuple(int(size) for size in tensor.shape.numpy())
            found[name] = Stored(str(tensor.location), tensor.offset or 0, DTYPES[tensor.dtype], shape)
    return found


class _Reader:
    """Reads the chain of nodes of a decoder, from the logits back to the inputs.

    Args:
        model: The decoder, already rewritten by the passes for the CUDA provider.
        cache: The decoder's KV cache.
        places: File, offset, type and shape of each initializer, by name.
    """

    def __init__(self, model: ir.Model, cache: CacheSpec, places: dict[str, Stored]) -> None:
        self.graph, self.cache, self.places = model.graph, cache, places
        self.outputs = {str(value.name): value for value in model.graph.outputs}

    def layout(self) -> DecoderLayout:
        """Returns the layout of the whole decoder; reads from the logits back to the inputs."""
        head, normed = self._matrix(self.outputs["logits"], "the head")
        final_norm, picked = self._norm(normed, "the final norm")
        x = self._input(picked, "GatherElements", "the choice of the positions with logits")
        layers: list[LayerLayout] = []
        nodes = []
        for index in reversed(range(self.cache.num_layers)):
            layer, x, node = self._layer(x, index)
            layers.insert(0, layer)
            nodes.append(node)
        positions, offset = self._start(x)
        node = nodes[-1]
        count = node.attributes["num_heads"].as_int()
        if not fits_head(self.cache.head_dim):
            raise _Unfit(f"its heads are {self.cache.head_dim} wide, not a multiple of 8 up to 256")
        if count % self.cache.num_heads:
            raise _Unfit(f"its {count} query heads do not share {self.cache.num_heads} heads of keys evenly")
        window = node.attributes["local_window_size"].as_int()
        return DecoderLayout(
            width=layers[0].query.weight.shape[0],
            heads=count,
            kv_heads=self.cache.num_heads,
            head_dim=self.cache.head_dim,
            scale=node.attributes["scale"].as_float(),
            window=max(window, 0),
            positions=positions,
            position_offset=offset,
            rotation=_rotation(node, self.cache.head_dim),
            layers=tuple(layers),
            final_norm=final_norm,
            head=head,
        )

    def _layer(self, x: ir.Value, index: int) -> tuple[LayerLayout, ir.Value, ir.Node]:
        """Reads a layer from its output ``x``; returns the layer's layout, the layer's input and the attention node."""
        where = f"layer {index}"
        middle, down, inner = self._residual(x, f"the feed-forward of {where}")
        gate, up, normed = self._activation(inner, where)
        feed_forward_norm, source = self._norm(normed, f"the feed-forward norm of {where}")
        if source is not middle:
            raise _Unfit(f"the feed-forward of {where} does not begin with a norm of its residual")
        before, out, attended = self._residual(middle, f"the attention of {where}")
        node = producer(attended, "GroupQueryAttention")
        if node is None or node.outputs[1] is not self.outputs[f"present.{index}.key"]:
            raise _Unfit(f"the attention of {where} has another form")
        parts = [self._matrix(value, f"query, key or value of {where}") for value in node.inputs[:3]]
        if any(source is not parts[0][1] for _, source in parts):
            raise _Unfit(f"query, key and value of {where} have different inputs")
        attention_norm, source = self._norm(parts[0][1], f"the attention norm of {where}")
        if source is not before:
            raise _Unfit(f"the attention of {where} does not begin with a norm of its residual")
        (query, _), (key, _), (value, _) = parts
        layer = LayerLayout(attention_norm, query, key, value, out, feed_forward_norm, gate, up, down)
        return layer, before, node

    def _residual(self, x: ir.Value, where: str) -> tuple[ir.Value, StoredMatrix, ir.Value]:
        """Reads the residual sum at the end of a block: ``x = before + input @ matrix``.

        Returns:
            ``before``, ``matrix`` and ``input``.
        """
        node = producer(x, "Add")
        if node is None:
            raise _Unfit(f"{where} does not end with a sum")
        before, added = operands(node)
        matrix, source = self._matrix(added, where)
        return before, matrix, source

    def _activation(self, inner: ir.Value, where: str) -> tuple[StoredMatrix | None, StoredMatrix, ir.Value]:
        """Reads the activation of a feed-forward block: ReLU of one matrix multiplication, or SwiGLU of two.

        Returns:
            The matrix of the gate (None for ReLU), the matrix of the up projection, and the input of both.
        """
        relu = producer(inner, "Relu")
        if relu is not None:
            up, normed = self._matrix(relu.inputs[0], f"the feed-forward of {where}")
            return None, up, normed
        product = producer(inner, "Mul")
        silu = producer(product.inputs[0], "Mul") if product is not None else None
        sigmoid = producer(silu.inputs[1], "Sigmoid") if silu is not None else None
        if product is None or silu is None or sigmoid is None or sigmoid.inputs[0] is not silu.inputs[0]:
            raise _Unfit(f"the activation of {where} is neither ReLU nor SwiGLU")
        gate, source = self._matrix(silu.inputs[0], f"the gate of {where}")
        up, normed = self._matrix(product.inputs[1], f"the feed-forward of {where}")
        if source is not normed:
            raise _Unfit(f"gate and up of {where} have different inputs")
        return gate, up, normed

    def _matrix(self, value: ir.Value | None, where: str) -> tuple[StoredMatrix, ir.Value]:
        """Reads a matrix multiplication with a weight, with or without a bias.

        Returns:
            The matrix (with scales and bias), and the multiplication's input.
        """
        node = producer(value, "MatMul")
        bias = None
        if node is None and value is not None:
            plus = producer(value, "Add")
            sources = [producer(one, "MatMul") for one in operands(plus)] if plus is not None else []
            node = next((one for one in sources if one is not None), None)
            last, bias = with_bias(node) if node is not None else (None, None)
            if last is not plus:
                node = None
        if node is None or node.inputs[0] is None:
            raise _Unfit(f"{where} is not a product with a weight")
        weight, scales = node.inputs[1], None
        blocks = producer(weight, "DequantizeLinear")
        if blocks is not None:
            if "block_size" not in blocks.attributes or _has_zero_point(blocks):
                raise _Unfit(f"the integers of {where} are not in blocks, or have zero points")
            axis = blocks.attributes["axis"].as_int() if "axis" in blocks.attributes else 1
            if axis not in (0, -2):
                raise _Unfit(f"the blocks of {where} lie along axis {axis}, not along the input (axis 0)")
            weight, scales = blocks.inputs[0], blocks.inputs[1]
        stored = [None if one is None else self._place(one, where) for one in (weight, scales, bias)]
        if stored[0] is None:
            raise _Unfit(f"{where} is not a product with a weight")
        matrix = StoredMatrix(stored[0], stored[1], stored[2])
        if matrix.fault and matrix.is_odd:
            raise _OddRows(f"the weight of {where} {matrix.fault}")
        if matrix.fault:
            raise _Unfit(f"the weight of {where} {matrix.fault}")
        return matrix, node.inputs[0]

    def _norm(self, value: ir.Value, where: str) -> tuple[StoredNorm, ir.Value]:
        node = value.producer()
        if node is None or node.op_type not in NORMS or node.inputs[0] is None or node.inputs[1] is None:
            raise _Unfit(f"{where} is neither a LayerNorm nor an RMSNorm")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        stored = StoredNorm(
            NORMS[node.op_type],
            self._place(node.inputs[1], where),
            None if bias is None else self._place(bias, where),
            node.attributes["epsilon"].as_float(),
        )
        return stored, node.inputs[0]

    def _start(self, x: ir.Value) -> tuple[Stored | None, int]:
        """Reads the nodes between the decoder's inputs and the first layer.

        Returns:
            The table of learned positions and their offset; (None, 0) if the embeddings are the first layer's input.
        """
        if str(x.name) == "inputs_embeds":
            return None, 0
        node = producer(x, "Add")
        embeds, learned = operands(node) if node is not None else (x, x)
        table = producer(learned, "Gather")
        if str(embeds.name) != "inputs_embeds" or table is None or table.inputs[0] is None:
            raise _Unfit("its first layer begins with more than embeddings and learned positions")
        index, offset = table.inputs[1], 0
        shifted = producer(index, "Add")
        if shifted is not None:
            index, number = operands(shifted)
            array = constant(number)
            offset = int(array.reshape(())) if array is not None else -1
        if index is None or str(index.name) != "position_ids" or offset < 0:
            raise _Unfit("its learned positions are not those of position_ids")
        return self._place(table.inputs[0], "the table of positions"), offset

    def _input(self, value: ir.Value, op_type: str, where: str) -> ir.Value:
        node = producer(value, op_type)
        if node is None or node.inputs[0] is None:
            raise _Unfit(f"{where} has another form")
        return node.inputs[0]

    def _place(self, value: ir.Value, where: str) -> Stored:
        if value.name not in self.places:
            raise _Unfit(f"a weight of {where} is not stored in a data file of the bundle")
        return self.places[str(value.name)]


def _has_zero_point(node: ir.Node) -> bool:
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return zero is not None and bool(np.any(zero.astype(np.int8)))


def _rotation(node: ir.Node, width: int) -> Array | None:
    """Returns cosines and sines of rotary positions, float32 ``[positions, d]``; None for an attention without them.

    Args:
        node: The attention.
        width: d, the width of a head. The kernels rotate whole heads.
    """
    if not node.attributes["do_rotary"].as_int():
        return None
    tables = [constant(value) for value in node.inputs[7:9]]
    table = np.concatenate([np.asarray(table, np.float32) for table in tables if table is not None], axis=1)
    if table.shape[1] != width:
        raise _Unfit(f"rotary positions turn {table.shape[1]} channels of heads {width} wide, not all of them")
    return table
