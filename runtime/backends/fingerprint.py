"""What an engine is tied to: the GPU, TensorRT, the driver, and the bundle it was made from."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blip2edge.errors import EngineError, option


@dataclass(frozen=True)
class Fingerprint:
    """Where an engine runs.

    Attributes:
        target: ``tensorrt`` or ``rtx``.
        tensorrt: Its version.
        gpus: Compute capabilities, as ``sm86``; for ``tensorrt`` that of the GPU it was built on.
        gpu: The GPU's name; empty where the engine was built without one.
        driver: Version of the CUDA driver; empty without one.
        machine: ``x86_64`` or ``aarch64``.
        bundle_sha256: Hash of ``bundle.json``, which seals all source files.
        version_compatible: Whether newer versions of the same major one run it.
        hardware_compatible: Whether every GPU from Ampere on runs it.
    """

    target: str
    tensorrt: str
    gpus: tuple[str, ...]
    gpu: str
    driver: str
    machine: str
    bundle_sha256: str
    version_compatible: bool = False
    hardware_compatible: bool = False

    @property
    def name(self) -> str:
        """The folder below ``engines/``."""
        parts = (self.target, self.tensorrt, *self.gpus, self.machine)
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part))

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``engine.json``."""
        return {**asdict(self), "gpus": list(self.gpus)}


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver tells it."""

    name: str
    compute_capability: int
    driver: str


def find_gpu() -> Gpu | None:
    """The first GPU, asked of the CUDA driver itself; None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(128)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    cuda.cuDriverGetVersion(ctypes.byref(version))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), 10 * major.value + minor.value, driver)


def fingerprint(
    target: str,
    version: str,
    bundle_sha256: str,
    compute_capabilities: Sequence[int],
    *,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
) -> Fingerprint:
    """The fingerprint of engines that would be built now.

    Args:
        target: ``tensorrt`` or ``rtx``.
        version: Of TensorRT.
        bundle_sha256: Hash of the bundle.
        compute_capabilities: Those asked for; empty for the GPU of this machine.
        version_compatible: Whether newer versions are to run them.
        hardware_compatible: Whether other GPUs are to run them.

    Raises:
        EngineError: None was asked for, and there is no GPU.
    """
    gpu = None if compute_capabilities else find_gpu()
    if gpu is None and not compute_capabilities:
        raise EngineError(
            "there is no NVIDIA GPU or no driver here, and an engine is built for a GPU",
            f"build on the board itself, or for a GPU elsewhere with: {option('target')} rtx {option('sm')} 86",
        )
    numbers = compute_capabilities or ([gpu.compute_capability] if gpu else [])
    return Fingerprint(
        target=target,
        tensorrt=version,
        gpus=tuple(f"sm{number}" for number in numbers),
        gpu=gpu.name if gpu else "",
        driver=gpu.driver if gpu else "",
        machine=platform.machine(),
        bundle_sha256=bundle_sha256,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )


FIRST_COMPATIBLE = 80  # Ampere
LABELS = {
    "bundle_sha256": "the bundle",
    "target": "target",
    "tensorrt": "TensorRT",
    "machine": "machine",
    "gpus": "compute capability",
    "gpu": "GPU",
}


def check_fingerprint(found: dict[str, Any], here: Fingerprint, engines: Path, rebuild: str) -> None:
    """Refuses engines that were made for something else.

    Args:
        found: ``fingerprint`` of an ``engine.json``.
        here: That of this machine.
        engines: Their folder.
        rebuild: The command that builds them again.

    Raises:
        EngineError: They differ; the first difference is named, with the command.
    """
    values = here.to_json()
    for key, label in LABELS.items():
        if found.get(key) == values[key] or _fits(key, found, here):
            continue
        raise EngineError(
            f"the engines in {engines} were built for {label} {_plain(found.get(key))}, "
            f"but here it is {_plain(values[key])}",
            f"build them again: {rebuild}",
        )


def _fits(key: str, found: dict[str, Any], here: Fingerprint) -> bool:
    """Whether a difference does not matter to these engines."""
    gpus, rtx = set(found.get("gpus", ())), found.get("target") == "rtx"
    if key == "tensorrt" and found.get("version_compatible"):
        made, now = (_numbers(text) for text in (str(found.get(key)), here.tensorrt))
        return made[:1] == now[:1] and made <= now
    if key == "gpu":
        return rtx or bool(found.get("hardware_compatible"))
    if key == "gpus" and found.get("hardware_compatible"):
        return all(int(name[2:]) >= FIRST_COMPATIBLE for name in here.gpus)
    return key == "gpus" and rtx and set(here.gpus) <= gpus


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _plain(value: Any) -> str:
    return " ".join(value) if isinstance(value, (list, tuple)) else str(value)
