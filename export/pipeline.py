"""``blip2edge export``: makes a verified bundle from a checkpoint.

1. Open: config, tensors, tokenizer and preprocessing are checked before anything is written.
2. Write: each graph is traced without weights and cast; its weights are written to its data file, one at a time.
3. Verify: the outputs of each graph are compared with torch's, and every written weight with the checkpoint's.
4. Record: the outputs of all graphs on seeded inputs, and captions of drawn pictures, for `certify`.
5. Publish: the manifest lists the hash of every file, and the directory is renamed to its final name.

After an error there is no new bundle, and an old one is unchanged.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from blip2edge.bundle.manifest import MANIFEST, GraphRecord, Manifest, MergingRecord
from blip2edge.bundle.outputs.publishing import check_output, staged
from blip2edge.bundle.schema import EMBEDDINGS_FILE, ElasticSpec, Parity
from blip2edge.bundle.trust.integrity import FileRecord, sha256_of
from blip2edge.choices import PRECISIONS
from blip2edge.errors import BackendError, ExportError
from blip2edge.export import verify
from blip2edge.export.draft_graph import draft_of
from blip2edge.export.graphs import cache_of, graphs_of
from blip2edge.export.merging import merging_of
from blip2edge.export.precision import convert, exceptions_of
from blip2edge.export.side_files import SideFiles
from blip2edge.export.to_onnx import trace
from blip2edge.export.weights import (
    Weights,
    check_hashes,
    check_token_table,
    write_token_table,
    write_weights,
)
from blip2edge.model.checkpoint.directory import Checkpoint, load_model
from blip2edge.model.checkpoint.lavis import open_checkpoint
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.models import Config, build_model, with_merged_tokens
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.packages import require
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.bench.certificate import reference_outputs
from blip2edge.runtime.bench.memory import Notify, check_memory, export_need
from blip2edge.runtime.bench.meters import MemoryMeter
from blip2edge.version import __version__

FULL_UP_TO = 1 << 30  # bytes of the largest checkpoint that is verified as a whole by default: about 4 GiB in fp32

TOKEN_TABLE = "language.embed_tokens.weight"


@dataclass(frozen=True)
class GraphReport:
    """The result of exporting one graph.

    Attributes:
        name: Name of the graph.
        bytes: Size of the graph's weights.
        seconds: Time to trace and write the graph.
        max_difference, relative, tolerance: Parity of the output with the largest relative difference, see
            :class:`~blip2edge.bundle.schema.Parity`.
    """

    name: str
    bytes: int
    seconds: float
    max_difference: float
    relative: float
    tolerance: float


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        bundle: The directory of the bundle.
        graphs: A report for each graph.
        verify: How the bundle was verified: ``full`` or ``sample``.
        seconds: Time for the whole export.
        peak_memory_bytes: Largest anonymous and shared memory of this process; 0 if it cannot be measured.
        merging: The effect of merged patches; None if no patches are merged.
        warnings: Keys of the checkpoint's files that are not used, one sentence for each file.
    """

    bundle: Path
    graphs: list[GraphReport]
    verify: str
    seconds: float
    peak_memory_bytes: int
    merging: MergingRecord | None = None
    warnings: Sequence[str] = ()


@dataclass
class _Written:
    """A graph that was written to the temporary directory of the export."""

    record: GraphRecord
    weights: Weights
    traced: Any
    seconds: float
    parity: list[Parity] = field(default_factory=list)


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    verify: str | None = None,
    base: str | Path | None = None,
    merge_tokens: int = 0,
    force: bool = False,
    anyway: bool = False,
    progress: ProgressCallback | None = None,
    notify: Notify | None = None,
) -> ExportReport:
    """Exports a checkpoint to a bundle.

    Args:
        checkpoint: A directory in transformers' format, a hub name, a PEFT adapter, or a ``.pth`` of LAVIS.
        output: Directory of the new bundle.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        verify: ``full`` compares whole graphs with torch. ``sample`` compares a few layers with torch, one at a time,
            so it needs the memory of one layer. With None, the checkpoint's size decides.
        base: The directory or hub name with the frozen weights for a ``.pth``, or with the base of an adapter.
        merge_tokens: Patches that are merged in each layer of the vision encoder (``model/vision/token_merging.py``).
        force: Replace an existing bundle.
        anyway: Go on if this machine has too little memory.
        progress: Called with a stage's name, steps done and steps in all.
        notify: Called with a warning if this machine has probably too little memory.

    Raises:
        CheckpointError: The checkpoint's files do not fit each other, or its model type is not supported.
        ExportError: A graph cannot be made, or its outputs differ from torch's (ParityError).
        OutputError: ``output`` exists, or cannot be written.
        BackendError: onnxruntime is not installed.
        UsageError: The model cannot merge this many patches.
    """
    require("onnxruntime", "the check of an export", BackendError)
    start = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    target = check_output(Path(output), force, MANIFEST, checkpoint, base)
    with MemoryMeter() as meter:
        source = open_checkpoint(checkpoint, base)
        source.config = with_merged_tokens(source.config, merge_tokens)
        side = SideFiles.read(source.side_directory(), source.config)
        mode = verify or ("full" if source.num_bytes() <= FULL_UP_TO else "sample")
        sizes = [math.prod(shape) for shape in source.own_shapes().values()]
        check_memory(
            export_need(max(sizes), sum(sizes), full=mode == "full"), ExportError, anyway=anyway, notify=notify
        )
        with staged(target, force) as staging:
            written = _write_graphs(source, staging, precision, report)
            if isinstance(source.config, CaptionerConfig):
                write_token_table(source.read(TOKEN_TABLE), TOKEN_TABLE, staging / EMBEDDINGS_FILE, _dtype(precision))
            side.write(staging)
            merging = _verify(source, written, precision, mode, report)
            _write_manifest(source, side, staging, written, precision, mode, merging, report)
            if mode == "full":  # the whole bundle fits into memory
                reference_outputs.add_reference_outputs(staging, progress=report)
        source.files.close()
    graphs = [_graph_report(name, item) for name, item in written.items()]
    return ExportReport(target, graphs, mode, time.perf_counter() - start, meter.peak, merging, side.warnings)


def _write_graphs(source: Checkpoint, staging: Path, precision: str, report: ProgressCallback) -> dict[str, _Written]:
    written: dict[str, _Written] = {}
    for name, definition in graphs_of(source.config).items():
        start = time.perf_counter()
        report(f"{name}: trace", 0, 1)
        with torch.device("meta"):
            module = definition.wrap(build_model(source.config).eval())
        traced = trace(module, definition.spec(source.config))
        report(f"{name}: trace", 1, 1)
        exceptions = convert(traced, precision, exceptions_of(source.config))
        data = staging / f"{name}.onnx.data"
        weights = write_weights(
            traced,
            source.read,
            data,
            _dtype(precision),
            partial(report, f"{name}: write"),
        )
        ir.save(traced.model, staging / traced.spec.file)
        onnx.checker.check_model(str(staging / traced.spec.file))
        record = GraphRecord(traced.spec, precision, fp32_exceptions=exceptions, data_files=(data.name,))
        written[name] = _Written(record, weights, traced, time.perf_counter() - start)
    return written


def _verify(
    source: Checkpoint, written: Mapping[str, _Written], precision: str, mode: str, report: ProgressCallback
) -> MergingRecord | None:
    """Compares every graph and the token embedding table with the checkpoint, and sets the parity of each graph.

    Returns the effect of merged patches; None if no patches are merged.
    """
    table = next(iter(written.values())).weights.file.with_name(EMBEDDINGS_FILE)
    if table.is_file():
        check_token_table(source.read(TOKEN_TABLE), TOKEN_TABLE, table, _dtype(precision))
    model = load_model(source) if mode == "full" else None
    for done, (name, item) in enumerate(written.items()):
        report("verify", done, len(written))
        check_hashes(item.weights, source.read, item.traced, _dtype(precision))
        if model is not None:
            item.parity = verify.compare_whole(name, model, item.weights.file.parent, item.traced, precision)
        else:
            item.parity = verify.compare_sample(name, source.config, source.read, item.weights, precision)
    report("verify", len(written), len(written))
    return merging_of(source.config, model)


def _dtype(precision: str) -> torch.dtype:
    return getattr(torch, PRECISIONS[precision])  # type: ignore[no-any-return]


def _write_manifest(
    source: Checkpoint,
    side: SideFiles,
    staging: Path,
    written: Mapping[str, _Written],
    precision: str,
    mode: str,
    merging: MergingRecord | None,
    report: ProgressCallback,
) -> None:
    files = {item.weights.file.name: item.weights.record for item in written.values()}
    for path in sorted(staging.iterdir()):
        if path.name not in files:
            files[path.name] = FileRecord.of(path)
    config = source.config
    text: Any = config if isinstance(config, RetrievalConfig) else config.language
    graphs = {name: replace(item.record, parity=tuple(item.parity)) for name, item in written.items()}
    Manifest(
        family=config.family,
        source=_source_of(source, report),
        precision=precision,
        verify=mode,
        graphs=graphs,
        cache=None if isinstance(config, RetrievalConfig) else cache_of(config),
        cross=None if isinstance(config, RetrievalConfig) else config.language.cross,
        max_positions=text.max_positions,
        vocab_size=text.vocab_size,
        preprocessing=side.preprocessing.to_json(),
        prompt=side.prompt,
        generation=side.generation,
        files=files,
        versions=_versions(),
        draft=draft_of(config),
        merging=merging,
        elastic=_elastic_of(config),
        tokenizer=side.tokenizer_flags,
    ).write(staging)


def _elastic_of(config: Config) -> ElasticSpec | None:
    """Returns the range of query numbers of a captioner's bridge; None if the bridge works with all queries only."""
    if isinstance(config, RetrievalConfig) or not config.elastic:
        return None
    return ElasticSpec(config.elastic, config.bridge.num_visual_tokens)


def _source_of(source: Checkpoint, report: ProgressCallback) -> dict[str, str]:
    """Returns the path of a checkpoint (and of its base), and one hash over the names and hashes of its files."""
    digest = hashlib.sha256()
    paths = source.paths()
    for done, path in enumerate(paths):
        report("hash the source", done, len(paths))
        digest.update(f"{sha256_of(path)}  {path.name}\n".encode())
    report("hash the source", len(paths), len(paths))
    where = {"checkpoint": str(source.laid_over or source.given)}
    if where["checkpoint"] != str(source.directory):
        where["base"] = str(source.directory)
    return {**where, "sha256": digest.hexdigest()}


def _versions() -> dict[str, str]:
    packages = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "tokenizers", "numpy")
    found = {name: version(name) for name in packages}
    return {"blip2edge": __version__, "python": platform.python_version(), **found}


def _graph_report(name: str, item: _Written) -> GraphReport:
    worst = max(item.parity, key=lambda parity: parity.relative)
    size = item.weights.record.size
    return GraphReport(name, size, item.seconds, worst.max_difference, worst.relative, worst.tolerance)
