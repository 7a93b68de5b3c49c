"""Makes the graph between two decode steps: it chooses the most likely token and prepares the inputs of the next step.

    logits float32 [B, 1, V], position_ids int64 [B, 1], cache_position int64 [1] or [B],
    seen float32 [B, V], penalty float32 [B, 1], held float32 [B, V], held_steps int64 [B, 1]
    -> token_ids int64 [B, 1], inputs_embeds [B, 1, D], the next position_ids, cache_position, seen, held_steps,
       and token_logprobs float32 [B, 1]

For tokens that are marked in ``seen``, positive logits are divided by ``penalty`` and negative ones multiplied (the
repetition penalty). Tokens that are marked in ``held`` (end tokens) are not chosen while ``held_steps`` is above 0.
``token_logprobs`` are the log-softmax of the unchanged logits at the chosen tokens. A row whose logits contain NaN gets
the token −1, which the host reports as an error.

The outputs are inputs of the next step, so the host can launch step after step on a GPU and read the tokens later. The
token embedding table is external data of the graph, at its offset in ``embed_tokens.safetensors``. A quantised table is
first converted to the decoder's floating type.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.safetensors_file import SafetensorsFile, StoredTensor, write_safetensors
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR, GraphSpec, TensorSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.engine.profiles import with_rows
from blip2edge.errors import EngineError
from blip2edge.runtime.backends.engine_files import STEP, TOKEN_LOGPROBS
from blip2edge.runtime.decoding.kv.fixed import CACHE_POSITION

NEXT = "next_"
"""The name of an output that becomes an input of the next step is this text and the name of the input."""

OPSET = 18
CHUNK = 4096  # rows of a quantised table written out at a time
STORED = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}


@dataclass(frozen=True)
class StepSource:
    """What is needed to make the step graph: the token embedding table, and the names, dtypes and shapes of tensors.

    Attributes:
        table: The file of the token embedding table (safetensors).
        spec: Inputs and outputs of the step graph.
    """

    table: Path
    spec: GraphSpec

    @classmethod
    def of(cls, bundle: Bundle, most_rows: int | None, per_row: bool = False) -> StepSource:
        """Returns the token embedding table of a bundle, and the inputs and outputs of the bundle's step graph.

        Args:
            bundle: An opened bundle.
            most_rows: Largest number of rows of the decoder; None for the value of the export.
            per_row: Whether the decoder has a ``cache_position`` for each row.
        """
        decoder = bundle.graph(DECODER).spec
        known = {tensor.name: tensor for tensor in (*decoder.inputs, *decoder.outputs)}
        embeds, logits = known["inputs_embeds"], known["logits"]
        batch, vocabulary, width = embeds.dims[0], logits.dims[-1], embeds.dims[-1]
        place = (batch if per_row else 1,)
        inputs = (
            TensorSpec("logits", "float32", (batch, 1, vocabulary)),
            TensorSpec("position_ids", "int64", (batch, 1)),
            TensorSpec(CACHE_POSITION, "int64", place),
            TensorSpec("seen", "float32", (batch, vocabulary)),
            TensorSpec("penalty", "float32", (batch, 1)),
            TensorSpec("held", "float32", (batch, vocabulary)),
            TensorSpec("held_steps", "int64", (batch, 1)),
        )
        outputs = (
            TensorSpec("token_ids", "int64", (batch, 1)),
            TensorSpec("inputs_embeds", embeds.dtype, (batch, 1, width)),
            TensorSpec(f"{NEXT}position_ids", "int64", (batch, 1)),
            TensorSpec(f"{NEXT}{CACHE_POSITION}", "int64", place),
            TensorSpec(f"{NEXT}seen", "float32", (batch, vocabulary)),
            TensorSpec(f"{NEXT}held_steps", "int64", (batch, 1)),
            TensorSpec(TOKEN_LOGPROBS, "float32", (batch, 1)),
        )
        return cls(bundle.file(EMBEDDINGS_FILE), with_rows(GraphSpec(STEP, inputs, outputs), most_rows))

    @property
    def table_bytes(self) -> int:
        """Returns the size in bytes of the file with the token embedding table."""
        return self.table.stat().st_size


def step_graph(source: StepSource) -> ir.Model:
    """Builds the step graph, which chooses the next token and looks up its embedding in the token embedding table.

    Raises:
        EngineError: The token embedding table is quantised; :func:`dense_table` writes a table in floating point.
    """
    inputs = [_value(tensor) for tensor in source.spec.inputs]
    outputs = [_value(tensor) for tensor in source.spec.outputs]
    logits, position_ids, cache_position, seen, penalty, held, held_steps = inputs
    tokens, embeds, next_ids, next_position, next_seen, next_steps, logprobs = outputs
    stored = _external(source.table)
    table = ir.Value(name=EMBEDDINGS_TENSOR, shape=stored.shape, type=ir.TensorType(stored.dtype))
    table.const_value = stored
    constants: dict[str, NDArray[Any]] = {
        "one": np.ones(1, np.int64),
        "minus_one": np.full(1, -1, np.int64),
        "zero_steps": np.zeros(1, np.int64),
        "axis": np.ones(1, np.int64),
        "zero": np.zeros(1, np.float32),
        "mark": np.ones((1, 1), np.float32),
        "lowest": np.full(1, np.finfo(np.float32).min, np.float32),
    }
    weights = {name: _constant(name, values) for name, values in constants.items()}
    nodes: list[ir.Node] = []

    def add(operator: str, *values: ir.Value, out: ir.Value | None = None, **attributes: int) -> ir.Value:
        node = ir.node(operator, list(values), attributes=attributes, outputs=None if out is None else [out])
        if out is None:
            node.outputs[0].name = f"{operator.lower()}_{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    flat = add("Squeeze", logits, weights["axis"])  # [B, V]
    factor = add("Mul", flat, penalty), add("Div", flat, penalty)
    negative = add("Less", flat, weights["zero"])
    penalised = add("Where", negative, *factor)
    scores = add("Where", add("Greater", seen, weights["zero"]), penalised, flat)
    is_held = add("And", add("Greater", held, weights["zero"]), add("Greater", held_steps, weights["zero_steps"]))
    allowed = add("Where", is_held, weights["lowest"], scores)
    best = add("ArgMax", allowed, axis=-1, keepdims=1)  # [B, 1]
    ordered = add("Or", negative, add("GreaterOrEqual", flat, weights["zero"]))  # false for NaN only
    unordered = add("Cast", add("Not", ordered), to=int(ir.DataType.FLOAT))
    broken = add("ReduceMax", unordered, weights["axis"], keepdims=1)
    add("Where", add("Greater", broken, weights["zero"]), weights["minus_one"], best, out=tokens)
    add("Cast", add("Gather", table, best, axis=0), out=embeds, to=int(embeds.dtype or stored.dtype))
    add("Add", position_ids, weights["one"], out=next_ids)
    add("Add", cache_position, weights["one"], out=next_position)
    marks = add("Expand", weights["mark"], add("Shape", best))
    add("ScatterElements", seen, best, marks, out=next_seen, axis=1)
    add("Sub", held_steps, weights["one"], out=next_steps)
    largest = add("ReduceMax", flat, weights["axis"], keepdims=1)  # [B, 1]
    total = add("ReduceSum", add("Exp", add("Sub", flat, largest)), weights["axis"], keepdims=1)
    shifted = add("Sub", add("GatherElements", flat, best, axis=1), largest)
    add("Sub", shifted, add("Log", total), out=logprobs)
    initializers = [table, *weights.values()]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name=STEP)
    return ir.Model(graph, ir_version=10, producer_name="blip2edge")


def _constant(name: str, values: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    return value


def dense_table(source: Path, dtype: str, output: Path) -> Path:
    """Returns a token embedding table in floating point, as TensorRT needs it; a quantised table is converted.

    Args:
        source: The file of the bundle's token embedding table.
        dtype: The decoder's floating-point dtype.
        output: File for the converted table.

    Returns:
        ``source`` if the table is not quantised, else ``output``.
    """
    if SafetensorsFile(source).stored(EMBEDDINGS_TENSOR).dtype in STORED:
        return source
    table = TokenTable(source, EMBEDDINGS_TENSOR, dtype)
    stored = StoredTensor({"float32": "F32", "float16": "F16"}[dtype], (table.num_rows, table.width))
    starts = range(0, table.num_rows, CHUNK)
    rows = (table.rows(np.arange(start, min(start + CHUNK, table.num_rows))) for start in starts)
    write_safetensors(output, {EMBEDDINGS_TENSOR: stored}, rows)
    return output


def _external(path: Path) -> ir.ExternalTensor:
    table = SafetensorsFile(path).stored(EMBEDDINGS_TENSOR)
    if table.dtype not in STORED:
        raise EngineError(
            f"expected a token table in floating point in {path}, got integers", "convert the table with dense_table"
        )
    return ir.ExternalTensor(
        path.name, table.offset, table.nbytes, STORED[table.dtype], shape=ir.Shape(table.shape),
        name=EMBEDDINGS_TENSOR, base_dir=str(path.parent),
    )  # fmt: skip


def _value(tensor: TensorSpec) -> ir.Value:
    shape = ir.Shape([dim if isinstance(dim, int) else dim.name for dim in tensor.dims])
    return ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(TYPES[tensor.dtype]))
