"""The command ``blip2edge inspect``: its flags, and the function that runs it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from blip2edge.bundle.schema import Axis
from blip2edge.cli.export import merging_line
from blip2edge.cli.flag_groups import add_bundle
from blip2edge.cli.next_steps import print_next, quoted, try_command
from blip2edge.cli.table import difference, size, table
from blip2edge.errors import EngineError, plural
from blip2edge.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from pathlib import Path

    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.manifest import GraphRecord, Manifest
    from blip2edge.bundle.schema import TensorSpec
    from blip2edge.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``inspect``."""
    add_bundle(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the SHA-256 of every file with the one recorded in bundle.json, optimized.json or engine.json",
    )


def run(options: argparse.Namespace) -> int:
    """Print what a bundle holds; with --verify hash every file first."""
    from blip2edge.bundle.bundle import Bundle

    bundle, count = Bundle.open(options.bundle), 0
    if options.verify:
        with Progress() as progress:
            count = _verify(bundle, lambda _, done, total: progress("hashing", done, total))
    manifest = bundle.manifest
    print("\n".join(_head(manifest)))
    for name, graph in manifest.graphs.items():
        print()
        print("\n".join(_graph(name, graph, manifest)))
    print()
    print("\n".join(_files(manifest)))
    print("\n".join([*_copies(bundle), *_engines(bundle)]))
    if options.verify:
        print(f"\nverified: every one of the {count} files has the recorded SHA-256")
        print("\n".join(_proof(options.bundle, bundle)))
    print_next(try_command(options.bundle, manifest))
    return 0


def _proof(name: Path, bundle: Bundle) -> list[str]:
    """Returns lines that say what the checked hashes prove, and what only a signature proves."""
    from blip2edge.bundle.trust.signature import SIGNATURE, how_to_sign

    known = f"{SIGNATURE} was not checked: blip2edge verify {quoted(name)} --key PUBLIC_KEY"
    if not (bundle.path / SIGNATURE).is_file():
        known = f"the bundle has no {SIGNATURE}: {how_to_sign(bundle.path).removeprefix('sign it: ')}"
    return [
        "the hashes show that the files are complete and unchanged since their records were written;",
        f"they do not show who wrote the files and the records, which a signature shows ({known})",
    ]


def _verify(bundle: Bundle, progress: ProgressCallback) -> int:
    """Hashes every file of the bundle, of its optimized copies and of its engines; returns their number."""
    from blip2edge.runtime.backends.engine_files import EngineSet, engine_folders
    from blip2edge.runtime.backends.optimized_copy import PACKAGES, read_copy

    bundle.verify(progress)
    count = len(bundle.manifest.files)
    for backend in PACKAGES:
        found = read_copy(bundle, backend, use_stamps=False)
        count += len(found[1].files) if found is not None else 0
    for folder in engine_folders(bundle):
        with suppress(EngineError):  # of another version: the list below says so
            engines = EngineSet.read(folder)
            engines.verify()
            count += len(engines.engines)
    return count


def _copies(bundle: Bundle) -> list[str]:
    """Describes the optimized copies of a bundle, and names the graphs that run from them."""
    from blip2edge.runtime.backends.optimized_copy import KIND, PACKAGES, read_copy

    lines = []
    for backend in PACKAGES:
        if not any((place / backend).is_dir() for place in bundle.derived(KIND)):
            continue
        found = read_copy(bundle, backend)
        if found is None:
            remake = f"blip2edge optimize {bundle.path} --backend {backend}"
            state = f"not used, because it belongs to another bundle or version: {remake}"
        else:
            state = ", ".join(found[1].graphs) or "no graph, because the portable ones are faster"
        lines.append(f"optimized for {backend}: {state}")
    return ["", *lines] if lines else []


def _engines(bundle: Bundle) -> list[str]:
    """Describes each folder of engines of a bundle: the number of engines, and their GPUs."""
    from blip2edge.runtime.backends.engine_files import EngineSet, engine_folders

    lines = []
    for folder in engine_folders(bundle):
        try:
            engines = EngineSet.read(folder)
        except EngineError as error:
            lines.append(f"engines in {folder}: not used: {error}")
            continue
        mark = engines.fingerprint
        gpus = ", ".join([*mark["gpus"], *([mark["gpu"]] if mark["gpu"] else [])])
        total = size(sum(record.file.size for record in engines.engines.values()))
        parent = "" if mark["bundle_sha256"] == bundle.sha256 else "; not used, because it belongs to another bundle"
        lines.append(
            f"engines for {mark['target']} {mark['tensorrt']} on {gpus}: {len(engines.engines)} engines "
            f"({', '.join(engines.engines)}), {total}, in {folder}{parent}"
        )
    return ["", *lines] if lines else []


def bundle_bytes(manifest: Manifest) -> int:
    """Returns the total size of all files in the manifest, in bytes."""
    return sum(record.size for record in manifest.files.values())


def _head(manifest: Manifest) -> list[str]:
    source = ", ".join(f"{key} {value}" for key, value in manifest.source.items())
    facts = {
        "family": manifest.family,
        "source": source,
        "precision": manifest.precision_text,
        "verified": f"{manifest.verify}, against torch" + (" (the original bundle)" if manifest.calibration else ""),
        "vocabulary": f"{manifest.vocab_size} tokens",
        "context": f"{manifest.max_positions} positions",
    }
    if manifest.merging is not None:
        key, _, value = merging_line(manifest.merging).partition(": ")
        facts[key] = value
    if manifest.elastic is not None:
        facts["elastic"] = f"{manifest.elastic.min_queries} to {manifest.elastic.max_queries} queries for each picture"
    if manifest.prompt is not None and manifest.cache is not None:
        prompt, cache = manifest.prompt, manifest.cache
        facts |= {
            "visual tokens": str(prompt.visual_tokens),
            "prompt": f"{prompt.template!r}, question {prompt.question!r}, turns: {', '.join(prompt.turns) or 'none'}",
            "cache": f"{cache.num_layers} layers x {cache.num_heads} heads x {cache.head_dim}",
            "generation": _pairs(manifest.generation),
        }
    if manifest.calibration:
        facts |= _calibration(manifest.calibration)
    for task, found in manifest.confidence.items():
        facts[f"confidence, {task}"] = f"{found['kind']}, on {found['pictures']} pictures; right: {found['right_if']}"
    facts |= {"preprocessing": _pairs(manifest.preprocessing), "made by": _pairs(manifest.versions)}
    width = max(map(len, facts))
    return [f"{key.ljust(width)}  {value}" for key, value in facts.items()]


def _calibration(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns lines that say how a bundle was calibrated, and how similar it is to the bundle before calibration."""
    lines = {"calibrated": f"{record['method']}, on {plural(record['pictures'], 'picture')}"}
    cosines = {
        graph: min(value["mean"] for value in outputs.values())
        for graph, outputs in record["cosine"].items()
        if outputs
    }
    if cosines:
        lines["cosine to the original bundle"] = ", ".join(f"{graph} {value:.5f}" for graph, value in cosines.items())
    captions = record.get("captions")
    if captions:
        lines["captions"] = f"{captions['same']:.1%} of {captions['pictures']} are the same as the original bundle's"
    return lines


def _pairs(values: object) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _graph(name: str, graph: GraphRecord, manifest: Manifest) -> list[str]:
    count = manifest.graph_bytes(graph)
    stored = "engine only" if manifest.engines_of else f"{', '.join(graph.files)}; {size(count)}"
    lines = [f"{name}  ({stored}; {graph.precision})"]
    lines += [f"  in   {text}" for text in _tensors(graph.spec.inputs)]
    lines += [f"  out  {text}" for text in _tensors(graph.spec.outputs)]
    if graph.fp32_exceptions:
        lines.append(f"  kept in fp32: {', '.join(graph.fp32_exceptions)}")
    for parity in graph.parity:
        part = f", sample: {parity.sample}" if parity.sample else ""
        lines.append(
            f"  parity {parity.output}: max difference {difference(parity.max_difference)}, relative "
            f"{difference(parity.relative)} (tolerance {difference(parity.tolerance)}), {len(parity.cases)} "
            f"cases{part}"
        )
    return lines


def _tensors(specs: tuple[TensorSpec, ...]) -> list[str]:
    """Returns a line for each tensor; the layers of the KV cache share one line."""
    lines = []
    folded: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        parts = spec.name.split(".")
        if len(parts) == 3 and parts[1].isdigit():
            folded.setdefault(f"{parts[0]}.*.{parts[2]}", []).append(spec)
        else:
            lines.append(f"{spec.name}  {_shape(spec)}")
    for name, layers in folded.items():
        lines.append(f"{name}  {_shape(layers[0])}  x {len(layers)} layers")
    return lines


def _shape(spec: TensorSpec) -> str:
    sizes = [f"{dim.name} {dim.min}..{dim.max}" if isinstance(dim, Axis) else str(dim) for dim in spec.dims]
    return f"{spec.dtype} [{', '.join(sizes)}]"


def _files(manifest: Manifest) -> list[str]:
    rows = [[name, size(record.size), record.sha256[:16]] for name, record in manifest.files.items()]
    rows.append(["total", size(bundle_bytes(manifest)), ""])
    return table(["file", "size", "sha256"], rows, right=(1,)).splitlines()
