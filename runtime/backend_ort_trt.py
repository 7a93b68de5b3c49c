"""The backend ``ort-tensorrt``: ONNX Runtime's TensorRT provider, which builds engines when it loads a graph.

The first load takes as long as a build does; engines and timings are kept in the user's cache. It was not yet run on a
GPU; ``blip2edge build`` and the backend ``tensorrt`` need neither ONNX Runtime nor a build on the way.
"""

from __future__ import annotations

from pathlib import Path

from blip2edge.manifest import cache_directory
from blip2edge.runtime.backend_cuda import CUDA, CUDA_OPTIONS, open_with
from blip2edge.runtime.bound import BoundSession
from blip2edge.runtime.session import Settled

TENSORRT = "TensorrtExecutionProvider"


def open_graph(
    path: Path,
    threads: int | None = None,
    settled: Settled | None = None,  # noqa: ARG001 - every backend is asked with it, and there is no copy for this one
) -> BoundSession:
    """Loads a graph with TensorRT, and CUDA for what it does not take; errors as those of ``backend_cuda``."""
    kept = cache_directory() / "ort-tensorrt"
    kept.mkdir(parents=True, exist_ok=True)
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(kept),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(kept),
    }
    return open_with(path, threads, TENSORRT, [(TENSORRT, options), (CUDA, CUDA_OPTIONS)])
