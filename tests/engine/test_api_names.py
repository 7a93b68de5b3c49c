"""Checks that every TensorRT and CUDA name in the code exists in all versions, or is used after a check for it.

It reads the syntax tree of each module; ``CLASS_OF`` gives the class of a variable by its name.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
API: dict[str, dict[str, list[str]]] = json.loads((ROOT / "tests/data/tensorrt_api.json").read_text())
"""By version, a class's members; under "" the module's classes. From the published bindings."""

CUDA: list[str] = json.loads((ROOT / "tests/data/cuda_api.json").read_text())
"""Names of cuda-python's runtime API that 12.8, 13.0 and 13.5 all have."""

RUNTIME = "runtime/tensorrt"
TENSORRT_FILES = (
    "engine/builder.py",
    *(f"{RUNTIME}/{name}.py" for name in ("session", "kv_cache", "workspace")),
)
CUDA_FILES = tuple(f"{RUNTIME}/{name}.py" for name in ("cuda", "session", "kv_cache", "workspace"))

CLASS_OF = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "inspector": "EngineInspector",
    "opened": "ICudaEngine",
    "engine": "ICudaEngine",
    "runtime": "Runtime",
    "_context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "_compiled": "IRuntimeCache",
}
"""What the variables and attributes of that name hold."""

OURS = {
    "runtime/tensorrt/session.py": {"ICudaEngine": set(), "IExecutionContext": {"bind", "enqueue", "can_be_captured"}},
}
"""Members of our own classes under such a name."""

WITHOUT_COMPUTE_CAPABILITIES = {"10.3.0", "10.13.3", "10.16.1", "11.0.0", "11.4.0"}
WITHOUT_RUNTIME_CACHE = WITHOUT_COMPUTE_CAPABILITIES  # TensorRT for RTX alone compiles at run time
GUARDED = {
    # name: versions in which the code does not come there
    "ComputeCapability": WITHOUT_COMPUTE_CAPABILITIES,
    "IBuilderConfig.num_compute_capabilities": WITHOUT_COMPUTE_CAPABILITIES,
    "IBuilderConfig.set_compute_capability": WITHOUT_COMPUTE_CAPABILITIES,
    "ICudaEngine.get_aliased_input_tensor": {"10.3.0", "10.13.3"},
    "BuilderFlag.REQUIRE_USER_ALLOCATION": WITHOUT_RUNTIME_CACHE,
    "ICudaEngine.create_runtime_config": {"10.3.0"},
    "IRuntimeConfig.set_execution_context_allocation_strategy": {"10.3.0"},
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": WITHOUT_RUNTIME_CACHE,
    "IRuntimeConfig.create_runtime_cache": WITHOUT_RUNTIME_CACHE,
    "IRuntimeConfig.set_runtime_cache": WITHOUT_RUNTIME_CACHE,
    "IRuntimeCache.serialize": WITHOUT_RUNTIME_CACHE,
    "IRuntimeCache.deserialize": WITHOUT_RUNTIME_CACHE,
    "IStreamReaderV2": {"10.3.0"},
    "IStreamReaderV2.__init__": {"10.3.0"},
    "SeekPosition": {"10.3.0"},
    "SeekPosition.SET": {"10.3.0"},
    "SeekPosition.CUR": {"10.3.0"},
    "SeekPosition.END": {"10.3.0"},
}


def owner_of(node: ast.expr) -> str | None:
    """The class of what an expression holds, by its last name; "" for the module itself."""
    if isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.Attribute):
        name = node.attr
    else:
        return None
    return "" if name == "trt" else CLASS_OF.get(name)


def names_used(file: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        owner = owner_of(node.value)
        if owner == "":
            if node.attr[0].isupper():
                yield node.attr
        elif owner is not None:
            if node.attr not in OURS.get(file, {}).get(owner, set()):
                yield f"{owner}.{node.attr}"
        elif isinstance(node.value, ast.Attribute) and owner_of(node.value.value) == "":
            yield f"{node.value.attr}.{node.attr}"


USED = sorted({name for file in TENSORRT_FILES for name in names_used(file)})


def cuda_names() -> set[str]:
    found = set()
    for file in CUDA_FILES:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("cuda") and len(node.attr) > len("cuda"):
                found.add(node.attr)
    return found


def test_the_walk_sees_what_the_code_uses() -> None:
    assert {
        "Builder",
        "Builder.create_network",
        "OnnxParser.parse",
        "MemoryPoolType.WORKSPACE",
        "Runtime.deserialize_cuda_engine",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.device_memory_size_v2",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
    } <= set(USED)
    assert set(GUARDED) <= set(USED)


def test_each_guard_is_needed_and_stands_in_the_code() -> None:
    """A guard without a version that lacks the name hides mistakes; the checks themselves are looked up."""
    for name, versions in GUARDED.items():
        owner, _, member = name.rpartition(".")
        for version in versions:
            known = API[version].get(owner, []) if owner else API[version][""]
            assert member not in known, f"{name} is in {version}: no guard is needed"
    assert 'hasattr(self.trt, "IStreamReaderV2")' in (ROOT / "runtime/tensorrt/session.py").read_text()
    assert "if engines.in_place:" in (ROOT / "runtime/tensorrt/kv_cache.py").read_text()
    assert (
        'getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)'
        in (ROOT / "runtime/tensorrt/session.py").read_text()
    )
    builder = (ROOT / "engine/builder.py").read_text()
    assert 'if options.target == "rtx":' in builder
    assert "if options.sm:" in builder


@pytest.mark.parametrize("version", sorted(API))
@pytest.mark.parametrize("name", USED)
def test_name_exists(version: str, name: str) -> None:
    if version in GUARDED.get(name, ()):
        return
    owner, _, member = name.rpartition(".")
    if member == "__init__":  # of every Python class
        owner, member = "", owner
    known = API[version][owner] if owner else API[version][""]
    assert member in known, f"{name} is not in TensorRT {version}"


def test_cuda_names_exist() -> None:
    names = cuda_names()
    assert "cudaMemcpyAsync" in names
    assert names <= set(CUDA), sorted(names - set(CUDA))
