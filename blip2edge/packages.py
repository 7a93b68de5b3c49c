"""Optional packages: the extra of blip2edge that installs each, and the error if a package is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from blip2edge.errors import Blip2EdgeError

EXTRAS = {
    **dict.fromkeys(
        ("onnx", "onnxscript", "safetensors", "torch", "transformers"),
        "export",
    ),
    "accelerate": "train",
    "av": "video",
    "fsspec": "bulk",
    "cryptography": "tls",
    "huggingface_hub": "hub",
    "model_signing": "sign",
    "onnx_ir": "build",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "paho": "mqtt",
    "peft": "peft",
    "pyarrow": "bulk",
    "ray": "ray",
    **dict.fromkeys(("tensorboard", "wandb"), "trackers"),
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    **dict.fromkeys(("prometheus_client", "python_multipart", "starlette", "uvicorn"), "serve"),
}
"""The extra of blip2edge that installs an optional package, by the name in the import statement."""


CLONE: Path | None = Path(__file__).resolve().parents[1]
"""The directory that contains the package blip2edge.

It is a clone of the repository if it contains ``hatch_build.py``, else a directory of installed packages.
"""


def pip_command(extra: str = "", upgrade: bool = False) -> str:
    """Returns the command that installs blip2edge again from the same source, with an extra such as ``serve``.

    If blip2edge runs from a clone, the command is ``pip install -e 'CLONE[serve]'``. If blip2edge was installed from
    git, the command is ``pip install 'blip2edge[serve] @ git+URL'``. In all other cases, for example if the wheel file
    of the installation was removed, the command is ``pip install 'blip2edge[serve]'``. If the shell's ``pip`` belongs
    to another environment than this Python, the command begins with the path of this Python.

    Args:
        extra: One extra, several joined by commas, or none.
        upgrade: Whether the command updates what is installed.
    """
    extras = f"[{extra}]" if extra else ""
    word, update = _requirement(extras), " --upgrade" if upgrade else ""
    if word.startswith("-e ") and upgrade:
        return f"git -C {word.removeprefix('-e ')} pull"
    return f"{_pip()} install{update} {word}"


def _requirement(extras: str) -> str:
    """Returns the argument of ``pip install``: ``-e CLONE``, a directory, or a requirement; quoted for the shell."""
    if CLONE is not None and (CLONE / "hatch_build.py").is_file():
        return f"-e {shlex.quote(f'{CLONE}{extras}')}"
    found = _direct_url()
    url = str(found.get("url", ""))
    path = _local_path(url)
    if path and not Path(path).exists():  # a wheel that was removed after the installation, as in the images
        found, url = {}, ""
    if "vcs_info" in found:
        revision = found["vcs_info"].get("requested_revision")
        url = f"{found['vcs_info']['vcs']}+{url}" + (f"@{revision}" if revision else "")
    elif "dir_info" in found:
        return shlex.quote(f"{path}{extras}")
    return shlex.quote(f"blip2edge{extras}" + (f" @ {url}" if url else "")) if extras or url else "blip2edge"


def _local_path(url: str) -> str:
    """Returns the path of a ``file:`` URL; empty for any other URL."""
    if not url.startswith("file:"):
        return ""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname  # slow to import, so not at every start

    return url2pathname(urlsplit(url).path)


def _direct_url() -> dict[str, Any]:
    """Returns pip's record of the source of blip2edge, a URL or a directory (PEP 610).

    It is empty if pip installed blip2edge from a package index, or if there is no record.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        text = distribution("blip2edge").read_text("direct_url.json")
    except PackageNotFoundError:
        return {}
    return dict(json.loads(text)) if text else {}


def _pip() -> str:
    """Returns ``pip`` if this command is the pip of this Python environment, else ``PYTHON -m pip``."""
    pip = shutil.which("pip")
    here = Path(sys.executable).absolute().parent
    return "pip" if pip is not None and Path(pip).absolute().parent == here else f"{shlex.quote(sys.executable)} -m pip"


TELEMETRY = {"openvino": "openvino_telemetry"}
"""Packages that send usage data to their maker while they are imported, each with the package that sends the data.

If the sending package cannot be imported, the other works in the same way and sends nothing.
``blip2edge/__init__`` switches off the telemetry of ONNX Runtime.
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


def install_command(extra: str = "") -> str:
    """Returns the advice for an error: how to install blip2edge, or an extra."""
    return f"install it: {pip_command(extra)}"


def missing(packages: Iterable[str]) -> list[str]:
    """Returns those of the packages that are not installed; no package is imported."""
    return [name for name in packages if not _is_found(name)]


def _is_found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # raised by an import hook that blocks the package
        return False


def installed(package: str) -> str:
    """Returns the version of a package by its PyPI name, or of its ``-gpu`` package; empty if neither is installed."""
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
        package: The name in the import statement.
        purpose: What needs the package: the beginning of the error.
        error: The class of the error if the package is missing.
        extra: The extra that installs the package; empty for the extra in :data:`EXTRAS`.
        hint: Further advice for the error.
    """
    try:
        with _hidden(TELEMETRY.get(package, "")):
            return importlib.import_module(package)
    except ImportError as cause:
        absent = isinstance(cause, ModuleNotFoundError) and cause.name == package
        problem = f"{purpose} needs {package}, which {'is not installed' if absent else f'does not load ({cause})'}"
        raise error(problem, install_command(extra or EXTRAS[package]) + hint) from cause
