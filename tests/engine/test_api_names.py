"""Every TensorRT name in engine/ exists in every version that it is used with, or stands behind a check of it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
API: dict[str, dict[str, list[str]]] = json.loads((ROOT / "tests/data/tensorrt_api.json").read_text())
"""By version, a class's members; under "" the module's classes. From the published bindings."""

CLASS_OF = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
}
"""What the variables of builder.py hold."""

GUARDED = {
    # name: versions in which the code does not come there
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": {"11.0.0", "11.4.0"},
    "ComputeCapability": {"10.3.0", "10.13.3", "10.16.1", "11.0.0", "11.4.0"},
    "IBuilderConfig.num_compute_capabilities": {"10.3.0", "10.13.3", "10.16.1", "11.0.0", "11.4.0"},
    "IBuilderConfig.set_compute_capability": {"10.3.0", "10.13.3", "10.16.1", "11.0.0", "11.4.0"},
}


def names_used() -> Iterator[str]:
    tree = ast.parse((ROOT / "engine/builder.py").read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, (ast.Name, ast.Attribute)):
            continue
        if isinstance(node.value, ast.Name) and node.value.id == "trt" and node.attr[0].isupper():
            yield node.attr
        elif isinstance(node.value, ast.Name) and node.value.id in CLASS_OF:
            yield f"{CLASS_OF[node.value.id]}.{node.attr}"
        elif (
            isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
            and node.value.value.id == "trt"
        ):
            yield f"{node.value.attr}.{node.attr}"


USED = sorted(set(names_used()))


def test_the_walk_sees_what_the_builder_uses() -> None:
    assert {
        "Builder",
        "Builder.create_network",
        "OnnxParser.parse_from_file",
        "MemoryPoolType.WORKSPACE",
    } <= set(USED)
    assert set(GUARDED) <= set(USED)


@pytest.mark.parametrize("version", sorted(API))
@pytest.mark.parametrize("name", USED)
def test_name_exists(version: str, name: str) -> None:
    if version in GUARDED.get(name, ()):
        return
    owner, _, member = name.rpartition(".")
    known = API[version][owner] if owner else API[version][""]
    if name == "ILogger.__init__":
        return  # of every Python class
    assert member in known, f"{name} is not in TensorRT {version}"
