"""``blip2edge explain``: which patches each query attends to, how alike the queries are, Flamingo's gates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.outputs.publishing import check_not_source, staged
from blip2edge.bundle.schema import DECODER
from blip2edge.errors import BackendError, BundleError, ImageError, UsageError, option, some
from blip2edge.explanation.attention import LayerWeights
from blip2edge.explanation.drawing import gates_picture, layer_sheet, matrix_picture
from blip2edge.explanation.gates import Gate, read_gates
from blip2edge.explanation.grid import View, view_of
from blip2edge.explanation.page import explanation_page, picture_tag
from blip2edge.explanation.probe import Probe, open_bridge
from blip2edge.explanation.queries import QueryComparison
from blip2edge.graph_files import load_graph
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.packages import require
from blip2edge.picture_files import printable
from blip2edge.progress import ProgressCallback, counted
from blip2edge.runtime.images.preprocess import DeferredImage, ImageSource, load_image

DOCUMENT, PAGE, MATRIX = "explain.json", "explain.html", "similarity.png"
SCHEMA = 1
SHOWN = 8
"""Default of ``--maps``: the number of pictures for which heat maps are drawn."""


@dataclass(frozen=True)
class ExplainReport:
    """The result of :func:`explain`.

    Attributes:
        directory: The directory with ``explain.html``, ``explain.json`` and the PNG files.
        document: The object of ``explain.json``.
        failures: The errors of pictures that could not be read.
    """

    directory: Path
    document: dict[str, Any]
    failures: Sequence[ImageError] = ()

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.directory / PAGE


def explain(
    images: Sequence[ImageSource],
    bundle: str | Path,
    output: str | Path,
    *,
    prompt: str | None = None,
    queries: int | None = None,
    maps: int = SHOWN,
    force: bool = False,
    threads: int | None = None,
    require_signature: str | Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: ProgressCallback | None = None,
) -> ExplainReport:
    """Writes which patches of pictures the queries of a bundle's bridge attend to, as pictures and one HTML page.

    The attention weights are those of the bundle's own graph, in its precision, run by ONNX Runtime on the CPU.

    Args:
        images: The pictures: paths, bytes, Pillow pictures or arrays.
        bundle: The bundle's directory, or ``hub:ORG/NAME[@REVISION]``.
        output: The directory to write.
        prompt: The instruction, for a bridge that reads one (InstructBLIP); None for the bundle's default.
        queries: Number of queries, for a bridge that works with several numbers (elastic); None for all.
        maps: Heat maps are drawn of this number of pictures, from the first on; the other pictures count only for the
            similarity of the queries.
        force: Whether an existing directory with an ``explain.json`` is replaced.
        threads: CPU threads; None for all cores.
        require_signature: A public key; the bundle must have a signature that fits this key. None: no signature is
            required.
        limits: The largest picture that is decoded.
        progress: Called with a stage's name, steps done and steps in all.

    Raises:
        BundleError: The bundle has no queries that attend to patches, has engines only, is in bf16, or merges patches.
        ImageError: No picture can be read.
        PromptError: The prompt does not fit the model.
        UsageError: ``prompt`` or ``queries`` is given, but the bundle takes none; or there are no pictures.
        OutputError: The directory exists already, or cannot be written.
    """
    require("onnxruntime", "explain", BackendError)
    if not images:
        raise UsageError("expected at least one picture, got none")
    opened = Bundle.open(bundle, require_signature=require_signature)
    opened.require_graphs("explain")
    if opened.manifest.precision == "bf16":
        raise BundleError(
            f"{opened.path} is in bf16, which ONNX Runtime does not run on a CPU",
            f"export the checkpoint with {option('precision')} fp32 or fp16, and explain the new bundle",
        )
    target = Path(output)
    check_not_source(target, opened.path)
    report = progress or (lambda stage, done, total: None)
    gates = _gates_of(opened)
    probe = open_bridge(opened, prompt, queries, threads, gated=bool(gates))
    with staged(target, force, marker=DOCUMENT) as staging:
        writer = _Writer(staging)
        if probe is None:
            document = _empty_document(opened)
            failures: list[ImageError] = []
        else:
            document, failures = _explained(probe, images, maps, limits, writer, partial(report, "pictures"))
        document["gates"] = [gate.to_json() for gate in gates]
        if gates:
            writer.save("gates.png", gates_picture(gates), "gates of the gated layers")
        (staging / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        page = explanation_page(document, opened.path.resolve().name, writer.tags)
        (staging / PAGE).write_text(page, encoding="utf-8")
        opened.check_unchanged()
    return ExplainReport(target, document, failures)


@dataclass
class _Writer:
    """Writes the PNG files of one run, and keeps the ``img`` element of each for the page, by file name."""

    directory: Path
    tags: dict[str, str] = field(default_factory=dict)

    def save(self, name: str, picture: Image.Image, text: str) -> None:
        """Writes one picture as a PNG file; ``text`` describes the picture on the page."""
        picture.save(self.directory / name)
        self.tags[name] = picture_tag(picture, text)


def _gates_of(bundle: Bundle) -> list[Gate]:
    """Reads the gates of a bundle's decoder; returns an empty list for families other than Flamingo."""
    manifest = bundle.manifest
    if manifest.cross is None or manifest.cross.mask != "steps" or manifest.cache is None:
        return []
    return read_gates(load_graph(bundle.file(bundle.graph(DECODER).spec.file)), manifest.cache.num_layers)


def _empty_document(bundle: Bundle) -> dict[str, Any]:
    keys = ("grid", "queries", "heads", "prompt", "similarity")
    whole = {"schema_version": SCHEMA, "bundle": str(bundle.path), "family": bundle.manifest.family}
    return {**whole, "precision": "", "layers": [], **dict.fromkeys(keys), "pictures": [], "broken": []}


def _explained(
    probe: Probe,
    images: Sequence[ImageSource],
    maps: int,
    limits: Limits,
    writer: _Writer,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Any], list[ImageError]]:
    """Runs the graphs on all pictures, and writes the heat maps and the picture of the queries' cosines.

    Returns the content of ``explain.json`` without the gates, and the errors of pictures that could not be read.
    """
    compared, heads = QueryComparison(), 0
    pictures: list[dict[str, Any]] = []
    broken: list[dict[str, str]] = []
    failures: list[ImageError] = []
    for number, source in enumerate(counted(images, len(images), progress)):
        name = _name(source, number)
        try:
            picture = load_image(source, limits)
            weights, tokens, heads = probe(picture)
        except ImageError as error:
            failures.append(error)
            broken.append({"image": name, "error": printable(error.problem)})
            continue
        compared.add(tokens)
        view = view_of(probe.preprocessing, *picture.size, probe.grid)
        layers = [_layer_record(layer, view) for layer in weights]
        shown = len(pictures) < maps
        for layer, record in zip(weights, layers, strict=True) if shown else ():
            record["file"] = f"{len(pictures):03d}-{_file_stem(name)}-layer-{layer.layer}.png"
            writer.save(record["file"], layer_sheet(picture, view, layer), f"{name}, layer {layer.layer}")
        size = {"width": picture.width, "height": picture.height}
        pictures.append({"image": name, **size, "shown": shown, "layers": layers})
    if not pictures:
        if len(failures) == 1:
            raise failures[0]
        reasons = some([error.problem for error in failures])
        raise ImageError(f"none of the {len(failures)} pictures can be read: {reasons}", "give other pictures")
    similarity = compared.result()
    writer.save(MATRIX, matrix_picture(similarity.matrix), "cosines of the queries")
    document = _empty_document(probe.bundle) | {
        "precision": probe.bundle.graph(probe.graph).precision,
        "grid": {**vars(probe.grid), "stride": list(probe.grid.stride)},
        "queries": len(similarity.matrix),
        "heads": heads,
        "layers": [layer.layer for layer in probe.layers],
        "prompt": probe.instruction,
        "similarity": {"file": MATRIX, **similarity.to_json()},
        "pictures": pictures,
        "broken": broken,
    }
    return document, failures


def _layer_record(layer: LayerWeights, view: View) -> dict[str, Any]:
    """Returns the object for one layer in the list ``layers`` of a picture in ``explain.json``."""
    queries = []
    for number, weights in enumerate(layer.patches):
        row, column = divmod(int(weights.argmax()), view.grid.columns)
        queries.append(
            {
                "peak": [round(edge, 2) for edge in view.rectangle(row, column)],
                "weight": float(weights.max()),
                "spread": float(layer.spread[number]),
                "before": float(layer.before[number]),
                "queries": float(layer.queries[number]),
            }
        )
    return {"layer": layer.layer, "queries": queries}


def _name(source: ImageSource, number: int) -> str:
    """Returns a picture's name for the files of the report: its path, or its number if it has no path."""
    if isinstance(source, DeferredImage):
        return printable(source.name)
    return printable(str(source)) if isinstance(source, (str, Path)) else f"picture {number}"


def _file_stem(name: str) -> str:
    """Returns a picture's name without characters that are not allowed in a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem)[:40].strip("-.") or "picture"
