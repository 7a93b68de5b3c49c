"""The backend ``cuda``: ONNX Runtime's CUDA provider, the cache bound on the GPU. It was not yet run on a GPU.

A provider's name in a list is a promise. Before a graph is loaded, the provider multiplies two matrices with the
fallback to the CPU switched off; and a session that came without it is refused.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from blip2edge.errors import BackendError, BundleError
from blip2edge.runtime.bound import BoundSession
from blip2edge.runtime.doctor import check_provider
from blip2edge.runtime.session import Settled

CUDA = "CUDAExecutionProvider"
GPU = ("cuda", 0)
KEPT = ("present.", "cross.")
"""Beginnings of the outputs that stay on the device: keys and values."""

CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "do_copy_in_default_stream": "1"}


def open_graph(
    path: Path,
    threads: int | None = None,
    settled: Settled | None = None,  # noqa: ARG001 - every backend is asked with it, and there is no copy for this one
) -> BoundSession:
    """Loads a graph on the GPU.

    Raises:
        BackendError: onnxruntime is not installed, or its CUDA provider does not run here.
        BundleError: The file is no graph that it can run.
    """
    return open_with(path, threads, CUDA, [(CUDA, CUDA_OPTIONS)])


def open_with(path: Path, threads: int | None, provider: str, providers: list[Any]) -> BoundSession:
    """Loads a graph with the provider that is to run it, proven beforehand.

    Args:
        path: The ``.onnx`` file.
        threads: CPU threads, for what no GPU takes.
        provider: The one that comes first.
        providers: All, best first, with their options.

    Raises:
        BackendError, BundleError: As :func:`open_graph`.
    """
    onnxruntime = proven(provider)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = BoundSession(onnxruntime, str(path), options, providers, GPU, is_kept)
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        reason = str(error).strip().splitlines()[0]
        raise BundleError(
            f"ONNX Runtime cannot load {path} on {provider} ({reason})", "see `blip2edge doctor`"
        ) from error
    if session.provider() != provider:
        raise BackendError(
            f"ONNX Runtime fell back to {session.provider()} for {path.name}", "see `blip2edge doctor`"
        )
    return session


def is_kept(name: str) -> bool:
    """Whether an output stays on the device."""
    return name.startswith(KEPT)


@cache
def proven(provider: str) -> Any:
    """The package onnxruntime, once its provider has multiplied two matrices.

    Raises:
        BackendError: It is not installed, or the provider does not run here.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"{provider} needs onnxruntime-gpu, which is not installed",
            'install it: pip install "blip2edge[gpu]"; on a Jetson, see docs/jetson.md',
        ) from error
    if provider not in onnxruntime.get_available_providers():
        names = ", ".join(onnxruntime.get_available_providers())
        raise BackendError(
            f"this onnxruntime has no {provider}, only {names}",
            'pip uninstall onnxruntime, then pip install "blip2edge[gpu]"; on a Jetson, see docs/jetson.md',
        )
    check = check_provider(onnxruntime, provider)
    if not check.ok:
        raise BackendError(f"{provider} is {check.detail}", check.fix or "see `blip2edge doctor`")
    return onnxruntime
