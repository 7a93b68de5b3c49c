"""``bundle.json``: the description of a bundle, with size and hash of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2edge.bundle.hub.names import is_repository
from blip2edge.bundle.manifest_fields import MANIFEST_FIELDS, disagreements
from blip2edge.bundle.prompt_spec import PromptSpec
from blip2edge.bundle.schema import CacheSpec, CrossSpec, DraftSpec, ElasticSpec, GraphSpec, Parity
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import BundleError, BundleVersionError, one_line, option
from blip2edge.packages import pip_command
from blip2edge.reading import checking, read_json

MANIFEST = "bundle.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class GraphRecord:
    """The record of one graph in ``bundle.json``.

    Attributes:
        spec: The graph's inputs and outputs.
        precision: ``fp32``, ``fp16``, ``bf16``, or a precision of ``calibrate``: ``int8``, ``int8-weights``, ``int4``.
        parity: Difference between each output and the same output of the torch model.
        fp32_exceptions: The parts that are kept in FP32 in a graph of lower precision, with the reason; one sentence
            each.
        data_files: Names of the graph's weight files.
    """

    spec: GraphSpec
    precision: str
    parity: tuple[Parity, ...] = ()
    fp32_exceptions: tuple[str, ...] = ()
    data_files: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the graph's ``.onnx`` file and its weight files."""
        return (self.spec.file, *self.data_files)

    def to_json(self) -> dict[str, Any]:
        """Returns the record as a JSON object for ``bundle.json``."""
        return {
            "file": self.spec.file,
            "data_files": list(self.data_files),
            "precision": self.precision,
            "fp32_exceptions": list(self.fp32_exceptions),
            **self.spec.to_json(),
            "parity": [parity.to_json() for parity in self.parity],
        }

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> GraphRecord:
        """Reads a record from the JSON object that :meth:`to_json` made; ``name`` is the graph's name."""
        return cls(
            spec=GraphSpec.from_json(name, values),
            precision=values["precision"],
            parity=tuple(Parity.from_json(item) for item in values.get("parity", ())),
            fp32_exceptions=tuple(values.get("fp32_exceptions", ())),
            data_files=tuple(values.get("data_files", ())),
        )


@dataclass(frozen=True)
class MergingRecord:
    """The effect of merging patches in the vision encoder (Token Merging, arXiv 2210.09461).

    Attributes:
        merge_tokens: Patches that each layer merges into others.
        embeds: Number of embeddings that the vision encoder returns.
        embeds_before: Number of embeddings that the vision encoder would return without merging.
        output: Name of the output that is compared: the bridge's, or the class token of a model without a bridge.
        cosine: Mean cosine between the output with and without merging, in torch; None if it was not measured.
        lowest: The lowest cosine of a single picture; None if it was not measured.
        pictures: Number of pictures that were compared.
    """

    merge_tokens: int
    embeds: int
    embeds_before: int
    output: str = ""
    cosine: float | None = None
    lowest: float | None = None
    pictures: int = 0


@dataclass(frozen=True)
class Manifest:
    """The contents of ``bundle.json``.

    Attributes:
        family: ``model_type`` of the source checkpoint.
        source: The checkpoint's path (``checkpoint``) and one hash over the names and hashes of its files (``sha256``).
        precision: ``fp32``, ``fp16`` or ``bf16``; in a calibrated bundle, the precision of all operators that are not
            quantised.
        verify: How the export was checked: ``full`` or ``sample``.
        graphs: The record of each graph, by name.
        cache: The decoder's KV cache; None for a matching model, which generates no text.
        max_positions: Longest context of the language model, or longest text of a matching model, in tokens.
        vocab_size: Number of logits, or of token ids for a matching model.
        preprocessing: How an image becomes pixel values: the fields of ``Preprocessing``.
        prompt: How an image and a text become the decoder's input; None for a matching model.
        generation: Defaults: ``eos_token_ids``, ``pad_token_id``, ``max_new_tokens``; empty for a matching model.
        files: Size and hash of every file of the bundle except ``bundle.json``.
        versions: Versions of the packages that made the bundle.
        cross: Keys and values that the decoder's cross-attention reads; None for a decoder without cross-attention.
        draft: The draft model inside the bridge; None if the checkpoint has none.
        calibration: How ``calibrate`` made this bundle (docs/precision.md); empty for a bundle of ``export``.
        merging: Patches that the vision encoder merges; None without token merging.
        elastic: The numbers of queries that the bridge works with; None if it works with all queries only.
        tokenizer: Settings that ``tokenizer.json`` cannot hold: arguments of
            :class:`~blip2edge.runtime.text.tokenizer.Tokenizer` that are true.
        confidence: The map of each task from log-probabilities to confidence, which ``calibrate --references`` fitted
            (docs/confidence.md); empty without one.
        engines_of: Hash of the ``bundle.json`` that the engines were built from, in a bundle that holds engines instead
            of graphs; empty in any other bundle.
    """

    family: str
    source: Mapping[str, str]
    precision: str
    verify: str
    graphs: Mapping[str, GraphRecord]
    cache: CacheSpec | None
    max_positions: int
    vocab_size: int
    preprocessing: Mapping[str, Any]
    prompt: PromptSpec | None
    generation: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    cross: CrossSpec | None = None
    draft: DraftSpec | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    merging: MergingRecord | None = None
    elastic: ElasticSpec | None = None
    tokenizer: Mapping[str, bool] = field(default_factory=dict)
    confidence: Mapping[str, Any] = field(default_factory=dict)
    engines_of: str = ""

    @property
    def precision_text(self) -> str:
        """Describes the precisions of the graphs in words, such as ``int8 (W8A8: bridge), computed from fp32``.

        :attr:`precision` is the precision of inputs, outputs and all operators that are not quantised.
        """
        graphs: dict[str, list[str]] = {}
        for name, graph in self.graphs.items():
            graphs.setdefault(graph.precision, []).append(name)
        if set(graphs) == {self.precision}:
            return self.precision
        shown = {"int8": "int8 (W8A8: {})", "int8-weights": "int8 weights ({})", "int4": "int4 weights ({})"}
        texts = [shown.get(kind, f"{kind} ({{}})").format(", ".join(names)) for kind, names in graphs.items()]
        return f"{', '.join(texts)}, computed from {self.precision}"

    @property
    def purpose(self) -> str:
        """What the model does, for messages: captions pictures, answers questions on them, or compares them."""
        if self.prompt is None:
            return "compares pictures with texts"
        return "answers questions on pictures" if self.prompt.required else "captions pictures"

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as the JSON object of ``bundle.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "family": self.family,
            "source": dict(self.source),
            "precision": self.precision,
            "verify": self.verify,
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "cache": None if self.cache is None else dict(vars(self.cache)),
            "cross": None if self.cross is None else dict(vars(self.cross)),
            "max_positions": self.max_positions,
            "vocab_size": self.vocab_size,
            "preprocessing": dict(self.preprocessing),
            "prompt": None if self.prompt is None else self.prompt.to_json(),
            "generation": dict(self.generation),
            "files": {name: dict(vars(record)) for name, record in sorted(self.files.items())},
            "versions": dict(self.versions),
            "draft": None if self.draft is None else dict(vars(self.draft)),
            "calibration": dict(self.calibration),
            **({"merging": dict(vars(self.merging))} if self.merging is not None else {}),
            **({"elastic": dict(vars(self.elastic))} if self.elastic is not None else {}),
            **({"tokenizer": dict(self.tokenizer)} if self.tokenizer else {}),
            **({"confidence": dict(self.confidence)} if self.confidence else {}),
            **({"engines_of": self.engines_of} if self.engines_of else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """Reads a manifest from the JSON object that :meth:`to_json` made.

        Raises:
            ValueError: A key is missing, or a value has the wrong type or range, or does not fit the graphs.
        """
        MANIFEST_FIELDS(values, "")
        manifest = cls(
            family=values["family"],
            source=values["source"],
            precision=values["precision"],
            verify=values["verify"],
            graphs={name: GraphRecord.from_json(name, graph) for name, graph in values["graphs"].items()},
            cache=CacheSpec(**values["cache"]) if values["cache"] else None,
            cross=CrossSpec(**values["cross"]) if values.get("cross") else None,
            max_positions=values["max_positions"],
            vocab_size=values["vocab_size"],
            preprocessing=values["preprocessing"],
            prompt=PromptSpec.from_json(values["prompt"]) if values["prompt"] else None,
            generation=values["generation"],
            files=_file_records(values),
            versions=values["versions"],
            draft=DraftSpec(**values["draft"]) if values.get("draft") else None,
            calibration=values.get("calibration", {}),
            merging=MergingRecord(**values["merging"]) if values.get("merging") else None,
            elastic=ElasticSpec(**values["elastic"]) if values.get("elastic") else None,
            tokenizer=values.get("tokenizer", {}),
            confidence=values.get("confidence", {}),
            engines_of=values.get("engines_of", ""),
        )
        specs = {name: graph.spec for name, graph in manifest.graphs.items()}
        size = _output_size(manifest.preprocessing)
        compared = (specs, manifest.cache, manifest.vocab_size, manifest.prompt, size, manifest.elastic)
        for problem in disagreements(*compared):
            raise ValueError(problem)
        return manifest

    def graph_bytes(self, graph: GraphRecord) -> int:
        """Returns the size of a graph's files in bytes; files that this bundle does not contain count as 0."""
        return sum(self.files[file].size for file in graph.files if file in self.files)

    def write(self, directory: Path) -> None:
        """Writes ``bundle.json`` into ``directory``."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        (directory / MANIFEST).write_text(text, encoding="utf-8")


def _file_records(values: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Returns the records of all files, by name; raises ValueError if a file of a graph has no record."""
    files = {name: FileRecord(**record) for name, record in values["files"].items()}
    graphs = {} if values.get("engines_of") else values["graphs"]
    for name, graph in graphs.items():
        for needed in (f"{name}.onnx", *graph.get("data_files", ())):
            if needed not in files:
                raise ValueError(f"expected the file {needed} of the graph {name} in files")
    return files


def _output_size(preprocessing: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns height and width of a preprocessed picture in pixels; None if they vary.

    Missing keys have the defaults of ``Preprocessing``.
    """
    size = preprocessing.get("size", {"height": 384, "width": 384})
    fixed = preprocessing.get("crop") or (size if preprocessing.get("resize", True) else {})
    return (fixed["height"], fixed["width"]) if "height" in fixed else None


def read_manifest(directory: Path) -> Manifest:
    """Reads the ``bundle.json`` of a directory.

    Raises:
        BundleError: The directory is not a bundle, or the file cannot be read.
        BundleVersionError: A newer version of blip2edge wrote the bundle.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        hub = f"; a bundle on the hub is named hub:{directory}" if is_repository(str(directory)) else ""
        raise BundleError(
            f"{directory} is not a directory; expected the directory of a bundle",
            f"make a bundle: blip2edge export CHECKPOINT -o BUNDLE{hub}",
        )
    again = f"export the checkpoint again with {option('force', on=True)}"
    hint = "make a bundle: blip2edge export CHECKPOINT -o BUNDLE"
    missing = BundleError(f"{directory} is not a bundle: it has no {MANIFEST}", hint)
    values = read_json(path, BundleError, again, missing=missing, strict=True)
    version = values.get("schema_version")
    if type(version) is not int or version < 1:
        given = f"got {version!r:.40}" if "schema_version" in values else "found no such key"
        raise BundleError(
            f"{path}: expected schema_version to be a whole number of at least 1, {given}; the file was edited, or "
            "another program wrote it",
            f"copy the bundle again, or {again}",
        )
    if version > SCHEMA_VERSION:
        raise BundleVersionError(
            f"{path} has schema version {version}, but this version of blip2edge reads up to {SCHEMA_VERSION}",
            f"upgrade blip2edge: {pip_command(upgrade=True)}",
        )

    def unfit(error: Exception) -> BundleError:
        return BundleError(f"{path} does not follow schema version {version} ({one_line(error)})", again)

    with checking(path, "a manifest", BundleError, again, explain=unfit):
        return Manifest.from_json(values)
