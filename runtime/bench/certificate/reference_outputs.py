"""Records the reference outputs of a bundle: outputs of its graphs for seeded inputs, and captions of drawn pictures.

`export` and `calibrate` record them with the exported graphs on the CPU; `certify` compares them with the outputs of
another backend or machine. An output is recorded as a count sketch (Charikar, Chen and Farach-Colton, 2002): each
element is added, with a positive or negative sign, to one of :data:`BINS` sums. The norm of the difference between two
sketches is the norm of the difference between the two outputs, to within about 10 %, for outputs of any size.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.fields import list_of, mapped, nullable, record, text, whole
from blip2edge.bundle.schema import DECODER
from blip2edge.bundle.trust.integrity import STAMPS, FileRecord
from blip2edge.errors import BundleError
from blip2edge.packages import installed
from blip2edge.progress import ProgressCallback
from blip2edge.reading import checking, read_json
from blip2edge.runtime.backends.base import BACKENDS
from blip2edge.runtime.backends.open_graph import GraphOpener
from blip2edge.runtime.backends.probe import exact_processor
from blip2edge.runtime.bench.certificate.graph_inputs import decode, draw_cross_inputs, draw_inputs
from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult
from blip2edge.runtime.decoding.decoder import HasDecoder, decoder_of
from blip2edge.runtime.text.prompt import PromptBuilder
from blip2edge.version import __version__

REFERENCE_OUTPUTS = "reference_outputs.json"
"""Name of the file with the reference outputs in a bundle."""

SCHEMA_VERSION = 1

BINS = 64
"""Number of values that are recorded for an output: the size of its count sketch, a random projection."""

PICTURES = 4
"""Number of pictures whose captions are among the reference outputs."""

TOKENS = 16
"""Largest length, in tokens, of the captions among the reference outputs."""

SIZE = (96, 128)
"""Rows and columns of a test picture from :func:`draw_pictures`."""

QUESTION = "What is in the picture?"
"""Question for models that cannot caption without a question."""

Sketch = NDArray[np.float32]

_LAYER = re.compile(r"\.\d+\.")  # in the name of an output of one layer: present.3.key


@dataclass(frozen=True)
class ReferenceOutputs:
    """The recorded outputs of a bundle. Each output is recorded as a sketch: a random projection to 64 numbers.

    Attributes:
        inputs: Sketches of the graphs' inputs, by ``graph/input``. They show whether NumPy still makes the same random
            numbers.
        outputs: Sketches of the graphs' outputs, by ``graph/output``, in the order in which the graphs compute them.
            The sketches of the decoder's keys and values show which layers differ.
        prompt: The prompt of every picture; None for the bundle's default.
        tokens: The caption of each test picture as token ids; empty for a model that compares pictures with texts.
        made_with: Versions of the packages and the processor with which the outputs were recorded.
    """

    inputs: Mapping[str, Sketch]
    outputs: Mapping[str, Sketch]
    prompt: str | None
    tokens: Sequence[tuple[int, ...]]
    made_with: Mapping[str, str]

    def write(self, directory: Path) -> None:
        """Writes ``reference_outputs.json`` into a directory."""
        values = {"schema_version": SCHEMA_VERSION, "bins": BINS, **asdict(self)}
        for name in ("inputs", "outputs"):
            values[name] = {key: _encoded(sketch) for key, sketch in getattr(self, name).items()}
        (directory / REFERENCE_OUTPUTS).write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, bundle: Bundle) -> ReferenceOutputs | None:
        """Reads a bundle's reference outputs; returns None if the bundle has no reference outputs.

        Raises:
            BundleError: The file cannot be read.
        """
        if REFERENCE_OUTPUTS not in bundle.manifest.files:
            return None
        path, fix = bundle.file(REFERENCE_OUTPUTS), "copy the bundle again"
        values = read_json(path, BundleError, fix)
        with checking(path, "reference outputs", BundleError, fix):
            _FIELDS(values, "")
            if (values["schema_version"], values["bins"]) != (SCHEMA_VERSION, BINS):
                raise ValueError(f"expected schema version {SCHEMA_VERSION} with {BINS} numbers for each output")
            inputs, outputs = (
                {key: _decoded(sketch) for key, sketch in values[name].items()} for name in ("inputs", "outputs")
            )
            tokens = [tuple(row) for row in values["tokens"]]
            return cls(inputs, outputs, values["prompt"], tokens, values["made_with"])


_TEXTS = mapped(text, text)
_FIELDS = record(
    {
        "schema_version": whole(1, 1 << 16), "bins": whole(1, 1 << 16), "inputs": _TEXTS, "outputs": _TEXTS,
        "prompt": nullable(text), "tokens": list_of(list_of(whole(-1, 1 << 24))), "made_with": _TEXTS,
    },
)  # fmt: skip


def record_outputs(
    bundle: Bundle, *, threads: int | None = None, progress: ProgressCallback | None = None
) -> ReferenceOutputs:
    """Runs the graphs of a bundle on the CPU, and records their outputs.

    Args:
        bundle: An opened bundle without an optimized copy, in a precision that ONNX Runtime runs on a CPU.
        threads: CPU threads; None for all cores.
        progress: Called with a stage's name, steps done and steps in all.
    """
    inputs: dict[str, Sketch] = {}
    outputs: dict[str, Sketch] = {}
    for name, drawn, made in run_graphs(bundle, "cpu", threads, progress=progress):
        inputs |= {f"{name}/{key}": sketch(array) for key, array in drawn.items()}
        outputs |= {f"{name}/{key}": sketch(array) for key, array in made.items()}
    prompt, results = None, []
    if bundle.manifest.prompt is not None:
        with Captioner(bundle, "cpu", threads, "none") as captioner:
            prompt = default_prompt(captioner.prompts)
            results = caption_drawings(captioner, prompt)
    made_with = {"blip2edge": __version__, "onnxruntime": installed("onnxruntime") or "", "numpy": np.__version__}
    return ReferenceOutputs(
        inputs, outputs, prompt, [one.tokens for one in results], {**made_with, "processor": exact_processor()}
    )


def add_reference_outputs(
    directory: Path, *, threads: int | None = None, progress: ProgressCallback | None = None
) -> None:
    """Records the references of a bundle that is being made, and lists them in its manifest.

    Args:
        directory: The staging directory, with all files of the bundle; older reference outputs are replaced.
        threads: CPU threads; None for all cores.
        progress: Called with a stage's name, steps done and steps in all.
    """
    bundle = Bundle.open(directory)
    if bundle.manifest.precision in BACKENDS["cpu"].refuses:
        return
    record_outputs(bundle, threads=threads, progress=progress).write(directory)
    files = {**bundle.manifest.files, REFERENCE_OUTPUTS: FileRecord.of(directory / REFERENCE_OUTPUTS)}
    replace(bundle.manifest, files=files).write(directory)
    (directory / STAMPS).unlink(missing_ok=True)  # it is bound to this directory, which gets another name


def run_graphs(
    bundle: Bundle,
    backend: str,
    threads: int | None,
    *,
    progress: ProgressCallback | None = None,
) -> Iterator[tuple[str, Mapping[str, Array], Mapping[str, Array]]]:
    """Runs every graph of a bundle on its seeded inputs, one after another, so that one graph is in memory at a time.

    Args:
        bundle: An opened bundle.
        backend: Name of a backend, not ``auto``.
        threads: CPU threads of an operator.
        progress: Called with a stage's name, steps done and steps in all.

    Yields:
        For each graph: its name, its inputs by name, and its outputs by name. Outputs of single layers (such as the
        keys of layer 3) come before all other outputs. For a decoder, the last outputs are the logits of
        :func:`decode`; they are the only outputs if the backend's decoder has other inputs than the exported decoder.
    """
    report = progress or (lambda stage, done, total: None)
    graphs = bundle.manifest.graphs
    for done, (name, graph) in enumerate(graphs.items()):
        report("reference outputs", done, len(graphs))
        opener = GraphOpener(bundle, backend, threads)
        try:
            session = opener(name)
            inputs = draw_inputs(graph.spec, {})
            outputs: dict[str, Array] = {}
            if set(session.input_names) == set(inputs) and not (name == DECODER and isinstance(session, HasDecoder)):
                found = session.run(inputs)
                outputs = {key: found[key] for key in sorted(found, key=lambda key: not _LAYER.search(key))}
            if name == DECODER:
                logits = decode(decoder_of(bundle, session), draw_cross_inputs(graph.spec, {}))
                outputs |= {f"logits of {kind}": array for kind, array in logits.items()}
            yield name, inputs, outputs
        finally:
            opener.close()
    report("reference outputs", len(graphs), len(graphs))


def caption_drawings(captioner: Captioner, prompt: str | None) -> list[CaptionResult]:
    """Captions the pictures of :func:`draw_pictures`, one at a time, with greedy decoding."""
    spec = captioner.bundle.manifest.prompt
    frames = 1 if spec is None else spec.frames
    room = captioner.bundle.manifest.max_positions
    options = {"max_new_tokens": min(TOKENS, room), "draft": "none", "num_beams": 1}
    return [
        captioner.caption(picture if frames == 1 else [picture] * frames, prompt=prompt, **options)  # type: ignore[arg-type]
        for picture in draw_pictures()
    ]


def draw_pictures() -> list[NDArray[np.uint8]]:
    """Makes test pictures ``[96, 128, 3]`` uint8 by integer arithmetic, so that they are equal on every machine."""
    row, column, channel = np.indices((*SIZE, 3), dtype=np.int64)
    pictures = []
    for number in range(PICTURES):
        wave = row * (2 + number) + column * (3 - number % 2) + row * column // (9 + number)
        pictures.append(((wave + 85 * channel) % 256).astype(np.uint8))
    return pictures


def default_prompt(prompts: PromptBuilder) -> str | None:
    """Returns the prompt for every picture: the bundle's default, or :data:`QUESTION` if the model needs a prompt."""
    spec = prompts.spec
    if spec.default is not None or not (spec.required or spec.instruction_positions):
        return spec.default
    return prompts.question(QUESTION) if spec.question else ""


def sketch(array: Array) -> Sketch:
    """Computes the count sketch of an array, float32 ``[64]``; all NaN if a value is not finite."""
    values = np.asarray(array, np.float64).ravel()
    if not np.isfinite(values).all():
        return np.full(BINS, np.nan, np.float32)
    bins, signs = _places(values.size)
    return np.bincount(bins, signs * values, BINS).astype(np.float32)


def deviation(got: Sketch, wanted: Sketch) -> float:
    """Estimates ``|a - b| / |b|`` (norms) from the sketches of a and b; infinite if a is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    norm = float(np.linalg.norm(wanted.astype(np.float64)))
    difference = float(np.linalg.norm(got.astype(np.float64) - wanted))
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


@lru_cache(maxsize=64)
def _places(size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns, for each of ``size`` elements, the index of the sum to which it is added, and its sign there, 1 or -1.

    Index and sign are computed from the element's index by SplitMix64 (Steele, Lea and Flood, 2014).
    """
    mixed = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    signs = 1.0 - 2.0 * (mixed >> np.uint64(63)).astype(np.float64)
    return (mixed % np.uint64(BINS)).astype(np.int64), signs


def _encoded(values: Sketch) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def _decoded(content: str) -> Sketch:
    values = np.frombuffer(base64.b64decode(content, validate=True), "<f4")
    if values.shape != (BINS,):
        raise ValueError(f"expected {BINS} numbers for an output (its random projection), got {values.size}")
    return values
