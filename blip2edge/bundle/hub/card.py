"""The model card of a bundle: the ``README.md`` of its repository on the hub, written from ``bundle.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blip2edge.bundle.hub.names import MAIN, HubName, repository_of
from blip2edge.bundle.manifest import GraphRecord, Manifest
from blip2edge.bundle.schema import DECODER
from blip2edge.errors import plural

MARK = "<!-- written by `blip2edge push`, SHA-256 {}; the next push keeps the card if it was edited -->"
_MARK = re.compile(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})"))

_UNKNOWN = "0" * 64

# What the model does -> the hub's task, and the arguments of the command that does it.
_CAPTION = ("image-to-text", "caption dog.jpg")
_ASK = ("visual-question-answering", 'ask dog.jpg "what is on the grass?"')
_MATCH = ("zero-shot-image-classification", 'match dog.jpg --text "a dog" "a cat"')


def model_card(manifest: Manifest, repository: str, revision: str = MAIN, license_id: str = "") -> str:
    """Writes the model card of a bundle in Markdown, with the hub's YAML at its beginning.

    Args:
        manifest: The bundle's manifest.
        repository: ``ORG/NAME`` of the bundle on the hub.
        revision: The branch that the bundle is pushed to.
        license_id: The hub's identifier of the license, such as ``bsd-3-clause``; empty if it is not known.
    """
    name = HubName(repository, revision)
    task, words = _task(manifest)
    parts = [
        _yaml(manifest, task, license_id),
        MARK.format(_UNKNOWN),
        f"# {repository.partition('/')[2]}",
        _summary(manifest),
        "## Run it",
        _commands(name, words),
        "## Graphs",
        _graphs(manifest),
        *(["## Calibration", _calibration(manifest.calibration)] if manifest.calibration else []),
        "## Files",
        _files(manifest),
    ]
    card = "\n\n".join(parts) + "\n"
    return card.replace(_UNKNOWN, _sha256(card))


def is_edited(card: str) -> bool:
    """Returns whether a model card was changed after :func:`model_card` wrote it.

    The card's first comment holds the hash of the original text.
    """
    found = _MARK.search(card)
    return found is None or found[1] != _sha256(card.replace(found[1], _UNKNOWN))


def _sha256(card: str) -> str:
    """Returns the SHA-256 of a card that has ``_UNKNOWN`` in place of its own hash.

    Cards that differ only in line ends, or in spaces at the end of lines, have the same hash.
    """
    lines = [line.rstrip() for line in card.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def base_model(manifest: Manifest) -> str:
    """Returns the hub name of the checkpoint that a bundle was exported from; empty for a checkpoint in a directory."""
    return repository_of(Path(manifest.source.get("checkpoint", "")))


def _task(manifest: Manifest) -> tuple[str, str]:
    if DECODER not in manifest.graphs:
        return _MATCH
    return _ASK if manifest.prompt is not None and manifest.prompt.required else _CAPTION


def _yaml(manifest: Manifest, task: str, license_id: str) -> str:
    """Writes the metadata block for the hub in YAML; texts are written as JSON, which is valid YAML."""
    precisions = dict.fromkeys(graph.precision for graph in manifest.graphs.values())
    values: dict[str, Any] = {"library_name": "blip2edge", "pipeline_tag": task}
    if base := base_model(manifest):
        values["base_model"] = base
        if manifest.calibration:
            values["base_model_relation"] = "quantized"
    if license_id:
        values["license"] = license_id
    values["tags"] = ["blip2edge", "onnx", "edge", manifest.family, *precisions]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def _summary(manifest: Manifest) -> str:
    """Writes the section that says which checkpoint the bundle comes from, and how it was verified."""
    base = base_model(manifest)
    source = f"[{base}](https://huggingface.co/{base})" if base else "a local checkpoint"
    size = sum(record.size for record in manifest.files.values())
    checked = {"full": "the whole model", "sample": "sampled layers"}.get(manifest.verify, manifest.verify)
    against = "the bundle that it was calibrated from" if manifest.calibration else "the checkpoint in PyTorch"
    graphs = f"ONNX graphs of {source} (family `{manifest.family}`, {manifest.precision_text}), {_size(size)}"
    lines = [
        f"{graphs}, for blip2edge: captions on edge devices without PyTorch.",
        f"The outputs were compared with {against}: {checked}.",
    ]
    if manifest.merging is not None:
        lines.append(
            f"{manifest.merging.merge_tokens} patches are merged in each layer of the vision encoder, so captions may "
            "differ from those of the checkpoint."
        )
    if manifest.elastic is not None:
        least, most = manifest.elastic.min_queries, manifest.elastic.max_queries
        lines.append(f"It works with {least} to {most} visual tokens for each picture: `--queries M`.")
    return " ".join(lines)


def _commands(name: HubName, words: str) -> str:
    lines = ["With blip2edge and its extras `cpu` and `hub`:", "", "```bash", f"blip2edge {words} -b {name}", "```"]
    if words.startswith("caption"):
        revision = "" if name.revision == MAIN else f', revision="{name.revision}"'
        lines += [
            "",
            "```python",
            "from blip2edge import Captioner",
            "",
            f'with Captioner.from_pretrained("{name.repository}"{revision}) as captioner:',
            '    print(captioner.caption("dog.jpg").text)',
            "```",
        ]
    return "\n".join(lines)


def _graphs(manifest: Manifest) -> str:
    rows = [
        (
            f"`{name}`",
            graph.precision,
            _size(manifest.graph_bytes(graph)) if manifest.graph_bytes(graph) else "engine only",
            _parity(graph),
        )
        for name, graph in manifest.graphs.items()
    ]
    return _table(("graph", "precision", "size", "largest difference, relative (tolerance)"), rows)


def _parity(graph: GraphRecord) -> str:
    worst = max(graph.parity, key=lambda parity: parity.relative / parity.tolerance, default=None)
    return "" if worst is None else f"{worst.output}: {worst.relative:.1e} ({worst.tolerance:.0e})"


def _calibration(record: Mapping[str, Any]) -> str:
    """Writes the section that says how the bundle was calibrated, and how much its outputs changed."""
    lines = [f"Method `{record['method']}`, on {plural(record['pictures'], 'picture')}."]
    captions = record.get("captions")
    if captions:
        lines.append(
            f"{captions['same']:.1%} of {captions['pictures']} captions are the same as those of the "
            "floating-point bundle."
        )
    rows = [
        (f"`{graph}`", output, f"{value['mean']:.5f}")
        for graph, outputs in record.get("cosine", {}).items()
        for output, value in outputs.items()
    ]
    return "\n\n".join([" ".join(lines), _table(("graph", "output", "cosine to floating point"), rows)])


def _files(manifest: Manifest) -> str:
    rows = [(f"`{file}`", _size(record.size), f"`{record.sha256[:16]}`") for file, record in manifest.files.items()]
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return f"{_table(('file', 'size', 'SHA-256'), rows)}\n\nMade by {made}."


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _size(count: int) -> str:
    """Formats a number of bytes in powers of 1000."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} B"
