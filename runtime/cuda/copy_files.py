"""The files of a bundle's copy for ``cuda-decoder``: the decoder's layout, and a cubin for each kind of GPU.

``optimized/cuda-decoder/`` has ``optimized.json`` with the hash of each file, and

    decoder.json     the layout: sizes, and the place of each weight in the bundle's own files
    rotation.bin     cosines and sines of rotary positions, float32 [positions, d]; only for such models
    sm_87.cubin …    the compiled kernels, one file for each compute capability

The weights are not stored again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.fields import (
    MAX_BYTES,
    Check,
    check_that,
    file_name,
    finite_number,
    list_of,
    nullable,
    one_of_texts,
    record,
    sha256,
    whole,
)
from blip2edge.bundle.manifest_fields import MAX_LAYERS, MAX_LENGTH, MAX_TOKENS, MAX_WIDTH
from blip2edge.errors import BackendError, BundleError, option
from blip2edge.reading import checking, read_json
from blip2edge.runtime.cuda.kernel import KERNELS
from blip2edge.runtime.cuda.layout import NUMPY, DecoderLayout, LayerLayout, Stored, StoredMatrix, StoredNorm
from blip2edge.runtime.cuda.steps import NORMS, fits_head

NAME = "cuda-decoder"
"""Name of the backend and of its copy."""

LAYOUT, ROTATION = "decoder.json", "rotation.bin"
SCHEMA_VERSION = 2

TEGRA = (72, 87, 88, 101, 110)
"""Compute capabilities of Jetson boards. Such a board runs no cubin for another GPU of the same major version, and no
other GPU runs the board's cubins; CUDA C++ Programming Guide, "Binary Compatibility"."""

_STORED = record(
    {
        "file": file_name,
        "offset": whole(0, MAX_BYTES),
        "dtype": one_of_texts(*NUMPY),
        "shape": list_of(whole(1, MAX_LENGTH), 1, 2),
    }
)
_MATRIX = record({"weight": _STORED, "scales": nullable(_STORED), "bias": nullable(_STORED)})
_NORM = record(
    {"kind": one_of_texts(*NORMS), "weight": _STORED, "bias": nullable(_STORED), "epsilon": finite_number(0)}
)
_LAYER = record(
    {
        **dict.fromkeys(("attention_norm", "feed_forward_norm"), _NORM),
        **dict.fromkeys(("query", "key", "value", "out", "up", "down"), _MATRIX),
        "gate": nullable(_MATRIX),
    }
)
LAYOUT_FIELDS: Check = record(
    {
        "schema_version": check_that(lambda value: value == SCHEMA_VERSION, f"the version {SCHEMA_VERSION}"),
        "kernels": sha256,
        "width": whole(1, MAX_WIDTH),
        "heads": whole(1, MAX_LAYERS),
        "kv_heads": whole(1, MAX_LAYERS),
        "head_dim": check_that(lambda value: type(value) is int and fits_head(value), "a multiple of 8 up to 256"),
        "scale": finite_number(),
        "window": whole(0, MAX_TOKENS),
        "positions": nullable(_STORED),
        "position_offset": whole(0, MAX_TOKENS),
        "rotation": nullable(_STORED),
        "layers": list_of(_LAYER, 1, MAX_LAYERS),
        "final_norm": _NORM,
        "head": _MATRIX,
    }
)
"""The fields of ``decoder.json``."""


def cubin_name(capability: int) -> str:
    """Returns the name of the file with the kernels for a compute capability (times ten)."""
    return f"sm_{capability}.cubin"


@cache
def kernel_sources() -> str:
    """Returns the SHA-256 of the kernels' sources without comments.

    Compiled kernels are used by the version with the same sources only, because their parameters may have another form
    in other versions.
    """
    digest = hashlib.sha256()
    for file in sorted(KERNELS.glob("*.cuh")):
        code = (line.partition("//")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
        digest.update("\n".join([file.name, *filter(None, code), ""]).encode())
    return digest.hexdigest()


def write_layout(layout: DecoderLayout, directory: Path) -> list[str]:
    """Writes a decoder's layout (where each weight is stored) into the directory of the optimized copy.

    Returns:
        The names of the written files.
    """
    values = {"schema_version": SCHEMA_VERSION, "kernels": kernel_sources(), **asdict(layout), "rotation": None}
    names = [LAYOUT]
    if layout.rotation is not None:
        table = np.ascontiguousarray(layout.rotation, np.float32)
        (directory / ROTATION).write_bytes(table.tobytes())
        values["rotation"] = asdict(Stored(ROTATION, 0, "float32", table.shape))
        names.append(ROTATION)
    (directory / LAYOUT).write_text(json.dumps(values, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")
    return names


def read_layout(bundle: Bundle, directory: Path) -> DecoderLayout:
    """Reads the layout from the copy's directory.

    Args:
        bundle: The bundle that the copy was made from.
        directory: The copy's directory; its files are checked already.

    Raises:
        BundleError: The file is no layout, or names weights that the bundle's files do not have.
    """
    path = directory / LAYOUT
    values = read_json(path, BundleError, strict=True)
    with checking(path, "the layout of a decoder", BundleError, REMAKE):
        LAYOUT_FIELDS(values, "")
        if values["kernels"] != kernel_sources():
            raise ValueError("its kernels were compiled from other sources than those of this version")
        layout = _layout(values, directory)
        for stored in layout.stored():
            if stored.file not in bundle.manifest.files:
                raise ValueError(f"{stored.file} is no file of the bundle")
            if stored.offset + stored.bytes > bundle.manifest.files[stored.file].size:
                raise ValueError(f"a weight ends behind the end of {stored.file}")
        layout.check()
    return layout


def find_cubin(directory: Path, capability: int) -> Path:
    """Returns the file with the kernels that a GPU can run.

    The file for the GPU's own compute capability is preferred. If there is none, the file for the next lower compute
    capability of the same major version is used, because GPUs (except Jetson boards) run such kernels as well.

    Args:
        directory: The copy's directory.
        capability: Compute capability of the GPU, times ten.

    Raises:
        BackendError: The copy has no kernels for this GPU.
    """
    found = {int(path.stem.removeprefix("sm_")): path for path in directory.glob("sm_*.cubin")}
    near = [one for one in found if one // 10 == capability // 10 and one <= capability and one not in TEGRA]
    best = capability if capability in found else max(near, default=0) if capability not in TEGRA else 0
    if not best:
        numbers = ", ".join(f"{one / 10:.1f}" for one in sorted(found))
        raise BackendError(
            f"expected a GPU of compute capability {numbers}, for which the copy has kernels, found one of "
            f"{capability / 10:.1f}",
            f"use another {option('backend')}",
        )
    return found[best]


REMAKE = f"make the copy again: blip2edge optimize BUNDLE {option('backend')} {NAME}"


def _layout(values: Mapping[str, Any], directory: Path) -> DecoderLayout:
    rotation = _stored(values["rotation"])
    layers = tuple(_layer(layer) for layer in values["layers"])
    given = {name: values[name] for name in ("width", "heads", "kv_heads", "head_dim", "window", "position_offset")}
    return DecoderLayout(
        **given,
        scale=float(values["scale"]),
        positions=_stored(values["positions"]),
        rotation=None if rotation is None else np.array(replace(rotation, file=ROTATION).read(directory)),
        layers=layers,
        final_norm=_norm(values["final_norm"]),
        head=_matrix(values["head"]),
    )


def _layer(values: Mapping[str, Any]) -> LayerLayout:
    return LayerLayout(
        attention_norm=_norm(values["attention_norm"]),
        query=_matrix(values["query"]),
        key=_matrix(values["key"]),
        value=_matrix(values["value"]),
        out=_matrix(values["out"]),
        feed_forward_norm=_norm(values["feed_forward_norm"]),
        gate=None if values["gate"] is None else _matrix(values["gate"]),
        up=_matrix(values["up"]),
        down=_matrix(values["down"]),
    )


def _matrix(values: Mapping[str, Any]) -> StoredMatrix:
    weight = _stored(values["weight"])
    if weight is None:
        raise ValueError("a matrix has no weight")
    return StoredMatrix(weight, _stored(values["scales"]), _stored(values["bias"]))


def _norm(values: Mapping[str, Any]) -> StoredNorm:
    weight = _stored(values["weight"])
    if weight is None:
        raise ValueError("a norm has no weight")
    return StoredNorm(values["kind"], weight, _stored(values["bias"]), float(values["epsilon"]))


def _stored(values: Mapping[str, Any] | None) -> Stored | None:
    if values is None:
        return None
    return Stored(values["file"], values["offset"], values["dtype"], tuple(values["shape"]))
