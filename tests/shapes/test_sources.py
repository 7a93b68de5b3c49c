"""Shapes from a bundle's manifest: what the number of embeddings tells of the vision encoder's positions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blip2edge.bundle.manifest import Manifest, MergingRecord, read_manifest
from blip2edge.bundle.schema import VISION
from blip2edge.errors import CheckpointError
from blip2edge.shapes.families import published_config
from blip2edge.shapes.model_shape import ModelShape
from blip2edge.shapes.sources import bundle_shape, find_shape

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "bundle"


def manifest_of(family: str, image: int, embeds: int, before_merging: int = 0) -> Manifest:
    """The golden bundle's manifest with pictures of ``image`` pixels and so many embeddings."""
    manifest = read_manifest(GOLDEN)
    record = manifest.graphs[VISION]
    pixels, output = record.spec.inputs[0], record.spec.outputs[0]
    pixels = replace(pixels, dims=(*pixels.dims[:2], image, image))
    output = replace(output, dims=(output.dims[0], embeds, output.dims[2]))
    spec = replace(record.spec, inputs=(pixels,), outputs=(output, *record.spec.outputs[1:]))
    merging = MergingRecord(8, embeds, before_merging) if before_merging else None
    graphs = {**manifest.graphs, VISION: replace(record, spec=spec)}
    return replace(manifest, family=family, graphs=graphs, merging=merging)


def found(shape: ModelShape) -> tuple[int, int, int, int]:
    tokens = shape.tokens(1, 0)
    return shape.patch_size, tokens["grid"], tokens["patches"], tokens["embeds"]


@pytest.mark.parametrize(
    ("family", "image", "embeds", "expected"),
    [
        pytest.param("blip-2", 224, 257, (14, 256, 257, 257), id="BLIP-2"),
        pytest.param("blip2edge", 518, 1374, (14, 1369, 1374, 1374), id="DINOv2 with registers"),
        pytest.param("blip2edge", 384, 729, (14, 729, 729, 729), id="SigLIP so400m"),
        pytest.param("blip2edge", 224, 49, (32, 49, 49, 49), id="EfficientNet-Lite0"),
        pytest.param("llava", 336, 576, (14, 576, 577, 576), id="LLaVA's CLIP, default"),
        pytest.param("llava", 336, 577, (14, 576, 577, 577), id="LLaVA's CLIP, full"),
        pytest.param("llava", 384, 728, (14, 729, 729, 728), id="LLaVA with SigLIP so400m, default"),
        pytest.param("blip-2", 224, 200, (16, 196, 200, 200), id="a small rest"),
        pytest.param("blip-2", 224, 250, (0, 250, 250, 250), id="no grid"),
    ],
)
def test_positions_of_a_bundle(family: str, image: int, embeds: int, expected: tuple[int, int, int, int]) -> None:
    assert found(bundle_shape(manifest_of(family, image, embeds), GOLDEN)) == expected


def test_positions_of_merged_patches() -> None:
    """The patch size is that of the grid before merging; the positions are those that remain."""
    shape = bundle_shape(manifest_of("blip-2", 224, 101, before_merging=257), GOLDEN)
    assert found(shape) == (14, 100, 101, 101)
    assert shape.prefix == 1


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("num_query_tokens", 0, "num_query_tokens must be a positive integer up to 2147483647, not 0"),
        (
            "num_query_tokens",
            10**80,
            f"num_query_tokens must be a positive integer up to 2147483647, not {'1' + '0' * 39}… (81 characters)",
        ),
        (
            "vision_config",
            {"num_hidden_layers": 1.5},
            "vision_config.num_hidden_layers must be a positive integer",
        ),
        ("vision_config", 3, "vision_config must be an object, not int"),
    ],
)
def test_an_error_names_the_file_once_and_the_key(key: str, value: object, told: str, tmp_path: Path) -> None:
    file = tmp_path / "of_a_user.json"
    file.write_text(json.dumps({**(published_config("blip2-opt-2.7b") or {}), key: value}))
    with pytest.raises(CheckpointError) as refused:
        find_shape(str(file))
    assert str(refused.value).startswith(f"{file}: {told}")
    assert "config.json" not in str(refused.value)
