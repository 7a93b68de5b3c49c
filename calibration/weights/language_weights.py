"""Weight-only integers for one graph of a bundle: choose formats, round, write, compare."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from blip2edge.bundle.integrity import FileRecord
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import TokenTable
from blip2edge.calibration.activations.quantise import Job
from blip2edge.calibration.results import CalibratedGraph, Made, RoundedMatrix
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import Product, Targets, find_targets, held
from blip2edge.calibration.weights.blocks import BlockFormat, Floats, Integers
from blip2edge.calibration.weights.token_table import BITS as TABLE_BITS
from blip2edge.calibration.weights.token_table import tied_head, write_rows, write_shared
from blip2edge.calibration.weights.weight_only import (
    Matrix,
    Store,
    WeightOnly,
    block_tensors,
    choose_formats,
    copy_others,
    form_of,
    quantize_weights,
    replace_weights,
)

PRECISIONS = {4: "int4", 8: "int8-weights"}
"""What the manifest calls a graph whose weights have so many bits."""

BITS_OF = {precision: bits for bits, precision in PRECISIONS.items()}

BITS = {"int4": 4, "int8": 8}
"""What ``--weights`` can name."""

RUNS = 128
"""Runs whose activations a matrix is rounded on: as many samples as GPTQ takes (arXiv 2210.17323, section 4)."""


def quantise_weights(job: Job, record: GraphRecord, bits: int, keep: Mapping[str, str] | None = None) -> Made:
    """Writes one graph with its weights in blocks of integers to the staging directory, and compares it.

    Args:
        job: What the steps of the calibration share.
        record: The graph's entry in the parent's manifest.
        bits: 4 or 8.
        keep: Matrices that stay as they are, with the reason.
    """
    start = time.perf_counter()
    name = record.spec.name
    source = job.parent.file(record.spec.file)
    model = ir.load(source)
    targets = find_targets(model)
    formats, left = choose_formats(targets.products, bits)
    left = {**targets.left, **left, **(keep or {})}
    formats = {weight: form for weight, form in formats.items() if weight not in left}
    data = job.staging / f"{name}.onnx.data"
    stores = _table(job, model, targets, formats) if name == DECODER else {}
    feeds = list(job.feeds.runs(name, RUNS)) if job.feeds.count(name) else []
    with DataFile(data) as file:
        matrices = quantize_weights(
            model,
            targets.products,
            file,
            WeightOnly(formats, threads=job.threads),
            feeds,
            store=stores,
            progress=partial(job.report, f"{name}: round"),
        )
    job.write(model, record)
    return _made(job, record, bits, matrices, left, file.record, time.perf_counter() - start)


def rewrite_weights(job: Job, made: Made, whole: Path, left: Mapping[str, str]) -> Made:
    """Writes a graph again with fewer matrices as integers; they are not rounded anew.

    Args:
        job: What the steps of the calibration share.
        made: The graph with all of them.
        whole: A directory with the files of that.
        left: Matrices that are as in the parent, with the reason.
    """
    start = time.perf_counter()
    name = made.record.spec.name
    record = job.parent.graph(name)
    model = ir.load(job.parent.file(record.spec.file))
    rounded = ir.load(whole / record.spec.file).graph.initializers
    matrices: dict[str, Matrix] = {}
    with DataFile(job.staging / f"{name}.onnx.data") as file:
        for weight, told in made.summary.matrices.items():
            if weight in left:
                continue
            tensors = block_tensors(rounded, weight)
            placed = [
                _beside(tensor, job.staging)
                if tensor.location == EMBEDDINGS_FILE
                else file.copy(str(tensor.name), tensor)
                for tensor in tensors
            ]
            matrices[weight] = Matrix(
                weight, form_of(*tensors), placed[0], placed[1], told.error, told.plain_error
            )
        copy_others(model, file, matrices)
    replace_weights(model, matrices)
    job.write(model, record)
    return _made(
        job,
        record,
        BITS_OF[made.record.precision],
        matrices,
        {**made.summary.left, **left},
        file.record,
        time.perf_counter() - start,
    )


def _beside(tensor: ir.ExternalTensor, directory: Path) -> ir.ExternalTensor:
    """The same place in the file of that name in another directory."""
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, tensor.dtype,
        shape=tensor.shape, name=str(tensor.name), base_dir=directory,
    )  # fmt: skip


def _made(
    job: Job,
    record: GraphRecord,
    bits: int,
    matrices: Mapping[str, Matrix],
    left: Mapping[str, str],
    seal: FileRecord,
    seconds: float,
) -> Made:
    name = record.spec.name
    path, data = job.staging / record.spec.file, f"{name}.onnx.data"
    seals = {path.name: FileRecord.of(path), data: seal}
    files: tuple[str, ...] = (data,)
    if any(matrix.integers.location == EMBEDDINGS_FILE for matrix in matrices.values()):
        seals[EMBEDDINGS_FILE] = FileRecord.of(job.staging / EMBEDDINGS_FILE)
        files = (data, EMBEDDINGS_FILE)
    precision = PRECISIONS[bits] if matrices else record.precision
    summary = CalibratedGraph(
        name,
        precision,
        seals[path.name].size + seal.size,
        job.parent.manifest.graph_bytes(record),
        seconds,
        len(matrices),
        left,
        job.compare(record),
        {
            weight: RoundedMatrix(
                matrix.form.bits, matrix.form.block, tuple(matrix.integers.shape.numpy()),
                matrix.error, matrix.plain_error,
            )
            for weight, matrix in matrices.items()
        },
    )  # fmt: skip
    made = replace(record, precision=precision, parity=(), data_files=files)
    return Made(made, seals, summary)


def _table(
    job: Job, model: ir.Model, targets: Targets, formats: Mapping[str, BlockFormat]
) -> dict[str, Store]:
    """Writes the token table, or says how the head that is the table is written."""
    spec = job.parent.graph(DECODER).spec
    table = TokenTable(job.parent.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, spec.inputs[0].dtype)
    path = job.staging / EMBEDDINGS_FILE
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

    head = tied_head(table, eight, lambda name: held(weights[name]).numpy())
    if head is not None:
        return {head: shared}
    if BlockFormat.for_width(table.width, TABLE_BITS) is not None:
        write_rows(table, path, partial(job.report, "token table"))
    return {}
