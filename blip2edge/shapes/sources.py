"""Reads the sizes of a model.

The model is a bundle, a checkpoint directory, a ``config.json``, a published model, or a model on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip2edge.bundle.hub.download import find_manifest, first_file, hub_client
from blip2edge.bundle.hub.errors import hub_errors
from blip2edge.bundle.hub.names import HubName, is_repository
from blip2edge.bundle.manifest import MANIFEST, GraphRecord, Manifest, read_manifest
from blip2edge.bundle.schema import BRIDGE, CROSS_KV, DECODER, EMBEDDINGS_FILE, TEXT_ENCODER, VISION
from blip2edge.errors import BundleError, CheckpointError
from blip2edge.packages import missing
from blip2edge.reading import naming_config, read_json
from blip2edge.shapes.families import published_config, shape_of, unknown_model
from blip2edge.shapes.model_shape import (
    WEIGHT_BYTES,
    AttentionProducts,
    CacheShape,
    ModelPart,
    ModelShape,
    WeightMatrix,
)
from blip2edge.shapes.parts import attention, feed_forward

CONFIG = "config.json"
MOST_PREFIX = 16  # a class token and registers; DINOv2 and DINOv3 have five
LATENT_SHARE = 0.12
"""Share of a Q-Former's weights that multiply the picture's embeddings; the others multiply its queries (BLIP-2)."""


ConfigCheck = Callable[[Any, str, "Path | None"], None]
"""Type of a function that raises an error if a config must be refused.

Its arguments are the content of the ``config.json``, the path or name of the config, and the checkpoint directory (None
if there is no such directory).
"""


def find_shape(model: str, check: ConfigCheck | None = None) -> tuple[ModelShape, str]:
    """Reads the sizes of a model.

    Args:
        model: A bundle, also by its name on the hub (only its ``bundle.json`` is downloaded), a checkpoint directory, a
            ``config.json``, or the name of a checkpoint on the hub.
        check: Called with the config of a file or of the hub before it is read; raises an error to refuse it.

    Returns:
        The sizes, and a text that says where they come from.

    Raises:
        CheckpointError: There is no such model, its config cannot be read, or the model is not supported.
        BundleError: The bundle cannot be read or downloaded, or its model writes no captions.
        MissingPackageError: A bundle on the hub is named, and ``huggingface_hub`` is not installed.
    """
    path = find_manifest(model)
    if (path / MANIFEST).is_file():
        return bundle_shape(
            read_manifest(path), Path(model)
        ), "estimated from the sizes of the bundle's files (a head that is the token table counts twice)"
    if path.is_dir() and not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} has no {MANIFEST} and no {CONFIG}", "give a bundle, a checkpoint directory, or a published name"
        )
    file = path / CONFIG if path.is_dir() else path
    if file.is_file():
        values = read_json(file, CheckpointError, "copy the file again")
        if check is not None:
            check(values, str(file), path if path.is_dir() else None)
        with naming_config(str(file)):
            return shape_of(values), f"from {file}"
    config = published_config(model)
    if config is not None:
        return shape_of(config), "from the list of published models"
    values = hub_config(model)
    if check is not None:
        check(values, model, None)
    with naming_config(model):
        return shape_of(values), f"from the {CONFIG} on the hub"


def hub_config(name: str) -> Any:
    """Reads the ``config.json`` of a model on the hub: from the hub's cache on this machine, or by the network.

    Raises:
        CheckpointError: The name is no name on the hub, ``huggingface_hub`` is not installed, or the hub cannot be
            reached.
    """
    if not is_repository(name) or missing(["huggingface_hub"]):
        raise unknown_model(name)
    try:
        hub = hub_client(name)
        place = Path(hub.constants.HF_HUB_CACHE)
        with hub_errors(f"its {CONFIG} could not be fetched", HubName(name), CheckpointError, place):
            file = first_file(hub, name, CONFIG)
    except CheckpointError as error:
        problem = unknown_model(name)
        raise CheckpointError(f"{problem.problem}; {error.problem}", f"{error.fix}; or {problem.fix}") from error
    return read_json(file, CheckpointError, "download the file again")


def bundle_shape(manifest: Manifest, path: Path) -> ModelShape:
    """Estimates a model's sizes from a bundle, which records the sizes of its tensors and files but not its config.

    The sizes of the KV cache, the numbers of tokens and the vocabulary are exact. The number of parameters is the size
    of the weight files divided by the size of one weight. The feed-forward of the vision encoder is assumed to be four
    times as wide as its layers. The patches follow from the number of embeddings if this is the number of cells in a
    square grid, plus a few other embeddings (:func:`_positions`).

    Raises:
        BundleError: The bundle's model writes no captions, or the bundle holds engines only.
    """
    cache, prompt = manifest.cache, manifest.prompt
    if prompt is None:
        raise BundleError(
            f"{path} {manifest.purpose}, and `plan` supports captioning models only",
            "measure it on this machine: blip2edge bench BUNDLE",
        )
    if cache is None or manifest.engines_of:
        raise BundleError(
            f"{path} has no graphs that write captions, and `plan` supports captioning models only",
            "give the bundle that the engines were built from, or a captioning model",
        )
    graphs = manifest.graphs
    pixels, embeds = graphs[VISION].spec.inputs[0], graphs[VISION].spec.outputs[0]
    image, count, encoder = pixels.width, _fixed(embeds.dims[1]), embeds.width
    weights = {name: _parameters(manifest, graph) for name, graph in graphs.items()}
    width = next(tensor.width for tensor in graphs[DECODER].spec.inputs if tensor.name == "inputs_embeds")
    queries = _fixed(graphs[BRIDGE].spec.outputs[0].dims[1]) if BRIDGE in graphs else 0
    parts = [_vision(weights[VISION], encoder)]
    if BRIDGE in graphs:
        parts.append(_bridge(weights[BRIDGE], encoder, queries, count, width))
    if TEXT_ENCODER in graphs:
        parts.append(ModelPart(TEXT_ENCODER, _stack(weights[TEXT_ENCODER], width, "encoder")))
    cross, source = 0, ""
    if manifest.cross is not None:
        cross = manifest.cross.num_layers * manifest.cross.num_heads * manifest.cross.head_dim
        source = {"encoder_states": "encoder", "visual_tokens": "queries"}.get(manifest.cross.source, "embeds")
        keys = WeightMatrix("keys and values", manifest.cross.source_dim, cross, "source", 2)
        parts.append(ModelPart(CROSS_KV, (keys,)))
    channels = cache.num_heads * cache.head_dim
    parts.append(
        ModelPart(
            DECODER,
            (
                *_stack(max(weights[DECODER] - width * manifest.vocab_size, 1), width, "steps"),
                WeightMatrix("head", width, manifest.vocab_size, "asked"),
            ),
            (AttentionProducts(channels, cache.num_heads, "steps", "context", cache.num_layers),),
        )
    )
    return ModelShape(
        family=manifest.family,
        parts=tuple(parts),
        bridge="none" if BRIDGE not in graphs else "mlp" if queries == count else "qformer",
        image_size=image,
        **_positions(manifest, image, count),
        queries=0 if queries == count else queries,
        least_queries=queries if manifest.elastic is None else manifest.elastic.min_queries,
        slots=prompt.visual_tokens // max(prompt.frames, 1),
        frames=prompt.frames,
        max_positions=manifest.max_positions,
        table=(manifest.vocab_size, width),
        tied=EMBEDDINGS_FILE not in manifest.files,
        cache=CacheShape(cache.num_layers, cache.num_heads, cache.head_dim, cross),
        width=width,
        source=source,
    )


def _positions(manifest: Manifest, image: int, count: int) -> dict[str, Any]:
    """Guesses the grid of patches of the vision encoder from the number of embeddings.

    - The number is a square plus a small rest: the square is the patches, the rest is a class token and registers.
    - The number is a square: in a LLaVA, the encoder is a CLIP whose class token is dropped; in another model, an
      encoder without class token. For a LLaVA with all patches of a SigLIP, the result has one position too many.
    - The number is a square minus one, in a LLaVA: the encoder is a SigLIP, which has no class token, and the first
      patch is dropped.
    - Any other number: the grid is not known, and every embedding counts as one position.

    Returns values for fields of :class:`ModelShape`, by name.

    Args:
        manifest: The bundle's manifest.
        image: Side of the picture in pixels.
        count: Number of embeddings that the vision encoder returns.
    """
    whole = count if manifest.merging is None else manifest.merging.embeds_before
    llava = manifest.family == "llava"
    side = math.isqrt(whole + 1 if llava else whole)
    before = whole - side * side
    if not -1 <= before <= MOST_PREFIX:
        return {"patch_size": 0, "cells": count, "prefix": 0, "keep_class": True}
    patch = max(1, round(image / max(side, 1)))
    if before < 0:
        return {"patch_size": patch, "cells": side * side, "prefix": 0, "keep_class": False}
    dropped = before == 0 and llava
    cells = count - before  # fewer than those of the grid if patches are merged
    return {"patch_size": patch, "cells": cells, "prefix": 1 if dropped else before, "keep_class": not dropped}


def _parameters(manifest: Manifest, graph: GraphRecord) -> int:
    """Estimates the number of parameters of a graph from the size of its weight files."""
    size = sum(manifest.files[file].size for file in graph.data_files if file in manifest.files)
    return round(size / WEIGHT_BYTES.get(graph.precision, 2.0))


def _fixed(size: Any) -> int:
    """Returns the length of a dimension: its fixed length, or the usual length (``opt``) of an axis."""
    return int(size) if isinstance(size, int) else int(size.opt)


def _stack(weights: int, width: int, rows: str) -> tuple[WeightMatrix, ...]:
    """Returns one matrix with ``weights`` weights, which stands for the unknown matrices of all layers together."""
    return (WeightMatrix("layers", width, max(1, round(weights / width)), rows),)


def _vision(weights: int, width: int) -> ModelPart:
    layers = max(1, round(weights / (12 * width * width)))
    inner = max(width, round((weights / layers - 4 * width * width) / (2 * width)))
    heads = max(1, width // 64)
    matrices = (
        *attention(layers, width, width, "patches"),
        *feed_forward(layers, width, inner, "patches"),
    )
    return ModelPart(VISION, matrices, (AttentionProducts(width, heads, "patches", "patches", layers),))


def _bridge(weights: int, encoder: int, queries: int, embeds: int, width: int) -> ModelPart:
    if queries == embeds:
        return ModelPart(BRIDGE, (WeightMatrix("layers", encoder, max(1, round(weights / encoder)), "embeds"),))
    pictures = round(weights * LATENT_SHARE)
    return ModelPart(
        BRIDGE,
        (
            WeightMatrix("keys and values", encoder, max(1, round(pictures / encoder)), "embeds"),
            WeightMatrix("layers", width, max(1, round((weights - pictures) / width)), "queries"),
        ),
    )
