"""Optional packages: the extra of blip2edge that installs each, and the error if a package is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from blip2edge.errors import Blip2EdgeError

EXTRAS = {
    **dict.fromkeys(
        ("huggingface_hub", "onnx", "onnxscript", "safetensors", "torch", "transformers"),
        "export",
    ),
    "accelerate": "train",
    "av": "video",
    "fsspec": "bulk",
    "cryptography": "tls",
    "model_signing": "sign",
    "onnx_ir": "build",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "paho": "mqtt",
    "peft": "peft",
    "pyarrow": "bulk",
    "ray": "ray",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    **dict.fromkeys(("prometheus_client", "python_multipart", "starlette", "uvicorn"), "serve"),
}
"""The extra by the name that a package is imported under."""


def pip_command(extra: str) -> str:
    """Returns the pip command that installs an extra of blip2edge, such as ``serve``."""
    return f"pip install 'blip2edge[{extra}]'"


TELEMETRY = {"openvino": "openvino_telemetry"}
"""Packages that send events to their maker while they are imported, and the package that does so for each.

Without it they work in the same way. ``blip2edge/__init__`` switches off the telemetry of ONNX Runtime.
"""


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Makes the import of a package fail with ImportError inside the block; an empty name hides nothing."""
    if not package or package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # importlib: None means that there is no such module
    try:
        yield
    finally:
        del sys.modules[package]


def install_command(extra: str) -> str:
    """The advice of an error: how to install an extra."""
    return f"install it: {pip_command(extra)}"


def missing(packages: Iterable[str]) -> list[str]:
    """The packages that are not installed; none is imported."""
    return [name for name in packages if not _is_found(name)]


def _is_found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # raised by an import hook that blocks the package
        return False


def installed(package: str) -> str:
    """The version of a package by its name on PyPI, or of its ``-gpu`` form; empty if neither is installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, so not at every start

    for name in (package, f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def require(package: str, purpose: str, error: type[Blip2EdgeError], extra: str = "", hint: str = "") -> Any:
    """Imports an optional package.

    Args:
        package: The name that it is imported under.
        purpose: What needs it: the beginning of the error.
        error: The class of the error if it is missing.
        extra: The extra that installs it; empty for that of :data:`EXTRAS`.
        hint: Further advice for the error.
    """
    try:
        with _hidden(TELEMETRY.get(package, "")):
            return importlib.import_module(package)
    except ImportError as cause:
        absent = isinstance(cause, ModuleNotFoundError) and cause.name == package
        problem = f"{purpose} needs {package}, which {'is not installed' if absent else f'does not load ({cause})'}"
        raise error(problem, install_command(extra or EXTRAS[package]) + hint) from cause
