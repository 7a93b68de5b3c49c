"""Rounds the weights of one graph to INT8 or INT4 in blocks: chooses formats, rounds, writes, compares the outputs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnx_ir as ir

from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import TokenTable
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.formats import GraphFormat
from blip2edge.calibration.initializers import initializer_tensor
from blip2edge.calibration.results import MatrixSummary, StagedGraph
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import Product, Targets, find_targets
from blip2edge.calibration.weights.blocks import BlockFormat, Floats, Integers
from blip2edge.calibration.weights.token_table import BITS as TABLE_BITS
from blip2edge.calibration.weights.token_table import tied_head, write_rows, write_shared
from blip2edge.calibration.weights.weight_only import (
    BlockMatrix,
    MatrixWriter,
    block_tensors,
    choose_formats,
    copy_others,
    form_of,
    quantize_matrices,
    replace_weights,
)
from blip2edge.graph_files import load_graph

PRECISIONS = {4: "int4", 8: "int8-weights"}
"""The precision that the manifest names for a graph, by the bits of the graph's narrowest integer matrix."""

RUNS = 128
"""Largest number of runs whose recorded inputs are used for rounding: 128, as in GPTQ (arXiv 2210.17323, section 4)."""


def quantize_weights(context: CalibrationContext, record: GraphRecord, form: GraphFormat) -> StagedGraph:
    """Writes one graph with block-quantized weights to the staging directory; compares it with the original graph.

    Args:
        context: The calibration.
        record: The graph's entry in the manifest of the original bundle.
        form: The format of the graph (weights in blocks), and the formats of single matrices.
    """
    start = time.perf_counter()
    name = record.spec.name
    model = load_graph(context.parent.file(record.spec.file))
    targets = find_targets(model)
    formats, unfit = choose_formats(targets.products, form)
    kept = {**targets.kept_float, **unfit}
    writers = _write_table(context, model, targets, formats) if name == DECODER else {}
    feeds = list(context.feeds.runs(name, RUNS)) if context.feeds.count(name) else []
    with DataFile(context.staging / f"{name}.onnx.data") as file:
        matrices = quantize_matrices(
            model,
            targets.products,
            file,
            formats,
            feeds,
            threads=context.threads,
            writers=writers,
            progress=partial(context.progress, f"{name}: round"),
        )
    return _staged(context, model, record, matrices, kept, file.record, start)


def rewrite_weights(
    context: CalibrationContext, graph: StagedGraph, directory: Path, kept_float: Mapping[str, str]
) -> StagedGraph:
    """Writes a quantized graph again with some matrices in floating point; the integers of the others are reused.

    Args:
        context: The calibration.
        graph: The graph with all matrices as integers.
        directory: The directory of this graph's files.
        kept_float: Why a matrix is kept in floating point, by the matrix's name.
    """
    start = time.perf_counter()
    name = graph.record.spec.name
    record = context.parent.graph(name)
    model = load_graph(context.parent.file(record.spec.file))
    rounded = ir.load(directory / record.spec.file).graph.initializers
    matrices: dict[str, BlockMatrix] = {}
    with DataFile(context.staging / f"{name}.onnx.data") as file:
        for weight, summary in graph.summary.matrices.items():
            if weight in kept_float:
                continue
            tensors = block_tensors(rounded, weight)
            integers, scales = (
                _in_directory(tensor, context.staging)
                if tensor.location == EMBEDDINGS_FILE
                else file.copy(str(tensor.name), tensor)
                for tensor in tensors
            )
            matrices[weight] = BlockMatrix(
                weight, form_of(*tensors), integers, scales, summary.error, summary.plain_error
            )
        copy_others(model, file, matrices)
    replace_weights(model, matrices)
    kept = {**graph.summary.kept_float, **kept_float}
    return _staged(context, model, record, matrices, kept, file.record, start)


def _in_directory(tensor: ir.ExternalTensor, directory: Path) -> ir.ExternalTensor:
    """Returns a tensor that refers to the file of the same name, at the same offset, in another directory."""
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, tensor.dtype,
        shape=tensor.shape, name=str(tensor.name), base_dir=directory,
    )  # fmt: skip


def _staged(
    context: CalibrationContext,
    model: ir.Model,
    record: GraphRecord,
    matrices: Mapping[str, BlockMatrix],
    kept_float: Mapping[str, str],
    seal: FileRecord,
    start: float,
) -> StagedGraph:
    """Writes a graph whose weights are already in their files.

    If the decoder's head is also the token embedding table, the head's integers are in the table's file.
    """
    data = {f"{record.spec.name}.onnx.data": seal}
    if any(matrix.integers.location == EMBEDDINGS_FILE for matrix in matrices.values()):
        data[EMBEDDINGS_FILE] = FileRecord.of(context.staging / EMBEDDINGS_FILE)
    summaries = {
        weight: MatrixSummary(
            matrix.form.bits, matrix.form.block, tuple(matrix.integers.shape.numpy()),
            matrix.error, matrix.plain_error,
        )
        for weight, matrix in matrices.items()
    }  # fmt: skip
    return context.stage(
        model,
        record,
        PRECISIONS[min((matrix.form.bits for matrix in matrices.values()), default=8)],
        data,
        start=start,
        products=len(matrices),
        kept_float=kept_float,
        matrices=summaries,
    )


def _write_table(
    context: CalibrationContext, model: ir.Model, targets: Targets, formats: Mapping[str, BlockFormat]
) -> dict[str, MatrixWriter]:
    """Writes the token embedding table as integers, unless the decoder's head has the same values and eight bits.

    Returns:
        If the head has the same values and eight bits: a dict with the name of the head's initializer, and a function
        that writes the head into the table's file. Otherwise an empty dict.
    """
    spec = context.parent.graph(DECODER).spec
    table = TokenTable(context.parent.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, spec.inputs[0].dtype)
    path = context.staging / EMBEDDINGS_FILE
    eight = {
        product.weight: product
        for product in targets.products
        if product.weight in formats and formats[product.weight].bits == 8
    }
    weights = model.graph.initializers

    def shared(
        product: Product, form: BlockFormat, integers: Integers, scales: Floats
    ) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        return write_shared(path, form, integers, scales, product.weight)

    head = tied_head(table, eight, lambda name: initializer_tensor(weights[name]).numpy())
    if head is not None:
        return {head: shared}
    if BlockFormat.for_width(table.width, TABLE_BITS) is not None:
        write_rows(table, path, partial(context.progress, "token table"))
    return {}
