"""blip2edge: from a trained BLIP-2-style captioner to captions on an edge device.

    from blip2edge import Captioner
    with Captioner.load("bundle/") as captioner:
        print(captioner.caption("dog.jpg", prompt="a photo of", max_new_tokens=30).text)

Each name below is imported at its first use: ``import blip2edge`` takes milliseconds and needs neither numpy nor torch.
If a name needs a package that is not installed, the name is a function that raises :class:`MissingPackageError` when it
is called. The error gives the command that installs the package. So ``from blip2edge import *``, ``help(blip2edge)``
and ``hasattr(blip2edge, name)`` work in every installation.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from blip2edge.errors import (
    BackendError,
    Blip2EdgeError,
    BundleError,
    BundleIntegrityError,
    BundleSignatureError,
    BundleVersionError,
    CheckpointError,
    ConfigError,
    DataError,
    DeadlineError,
    EngineError,
    EngineFaultError,
    ExportError,
    ImageError,
    MissingPackageError,
    OutputError,
    OverloadError,
    ParityError,
    ProcessError,
    PromptError,
    UnsupportedModelError,
    UsageError,
)
from blip2edge.packages import install_command
from blip2edge.version import __version__

# ONNX Runtime reads this variable when it is imported. Without it, ONNX Runtime writes a device id and events to the
# user's cache directory, and sends them to its maker. (Other packages: TELEMETRY in packages.py.)
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from collections.abc import Callable

    from blip2edge.bundle.bundle import Bundle
    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.engine.build import build_bundle as build
    from blip2edge.explanation.pipeline import explain
    from blip2edge.export.pipeline import export_checkpoint
    from blip2edge.optimization.pipeline import optimize
    from blip2edge.runtime.captioning.captioner import Captioner
    from blip2edge.runtime.captioning.matcher import Matcher
    from blip2edge.runtime.captioning.request import CaptionResult, MatchResult
    from blip2edge.runtime.decoding.options import GenerationOptions
    from blip2edge.training.evaluation.pipeline import evaluate

__all__ = [
    "BackendError",
    "Blip2EdgeError",
    "Bundle",
    "BundleError",
    "BundleIntegrityError",
    "BundleSignatureError",
    "BundleVersionError",
    "CaptionResult",
    "Captioner",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "EngineError",
    "EngineFaultError",
    "ExportError",
    "GenerationOptions",
    "ImageError",
    "MatchResult",
    "Matcher",
    "MissingPackageError",
    "OutputError",
    "OverloadError",
    "ParityError",
    "ProcessError",
    "PromptError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "build",
    "calibrate",
    "evaluate",
    "explain",
    "export_checkpoint",
    "optimize",
]

# Public name -> where it is defined, and the extra with the packages that it needs (empty: blip2edge's own).
_HOMES = {
    "Bundle": ("blip2edge.bundle.bundle:Bundle", ""),
    "CaptionResult": ("blip2edge.runtime.captioning.request:CaptionResult", ""),
    "Captioner": ("blip2edge.runtime.captioning.captioner:Captioner", ""),
    "GenerationOptions": ("blip2edge.runtime.decoding.options:GenerationOptions", ""),
    "MatchResult": ("blip2edge.runtime.captioning.request:MatchResult", ""),
    "Matcher": ("blip2edge.runtime.captioning.matcher:Matcher", ""),
    "build": ("blip2edge.engine.build:build_bundle", "build"),
    "calibrate": ("blip2edge.calibration.pipeline:calibrate", "cpu,build"),
    "evaluate": ("blip2edge.training.evaluation.pipeline:evaluate", "cpu,export"),
    "explain": ("blip2edge.explanation.pipeline:explain", "cpu,build"),
    "export_checkpoint": ("blip2edge.export.pipeline:export_checkpoint", "cpu,export"),
    "optimize": ("blip2edge.optimization.pipeline:optimize", "cpu,build"),
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562).

    Raises:
        AttributeError: The package has no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'blip2edge' has no attribute {name!r}")
    home, extra = _HOMES[name]
    module, _, attribute = home.partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "blip2edge"):
            raise
        return _placeholder(name, package, extra)  # not kept: the package may be installed later
    globals()[name] = value
    return value


def _placeholder(name: str, package: str, extra: str) -> Callable[..., Any]:
    """Returns a function to use in place of a name whose module cannot be imported.

    A call of the returned function raises MissingPackageError.
    """
    problem = f"blip2edge.{name} needs the package {package!r}, which is not installed"
    fix = install_command(extra)

    def placeholder(*_arguments: Any, **_options: Any) -> Any:
        raise MissingPackageError(problem, fix)

    placeholder.__name__ = placeholder.__qualname__ = name
    placeholder.__doc__ = f"Not available: {problem}; {fix}."
    return placeholder


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
