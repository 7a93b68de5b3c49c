"""Compiles graphs with OpenVINO and writes the compiled models to files, which open sooner than the graphs.

A file also holds the weights. It is valid for one version of OpenVINO and one kind of processor.
"""

from __future__ import annotations

import time
from pathlib import Path

from blip2edge.runtime.backends.openvino import OpenVinoSession

ROUNDS = 3
"""Number of times that the graph and the compiled model are opened in turn; the least time of each counts."""


def compile_to(graph: Path, blob: Path) -> tuple[float, float]:
    """Compiles a graph with OpenVINO and writes the compiled model.

    Args:
        graph: The exported ``.onnx`` file.
        blob: The file to write.

    Returns:
        CPU time to open the graph and to open the compiled model, in milliseconds.

    Raises:
        BackendError: openvino is not installed.
        BundleError: OpenVINO cannot load the graph or the compiled model; then no ``blob`` remains.
    """
    try:
        return _written(graph, blob)
    except BaseException:
        blob.unlink(missing_ok=True)
        raise


def _written(graph: Path, blob: Path) -> tuple[float, float]:
    session = OpenVinoSession(graph, 1)
    blob.write_bytes(session.export())
    session.close()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for path, compiled, found in ((graph, False, times[0]), (blob, True, times[1])):
            start = time.process_time()
            OpenVinoSession(path, 1, compiled=compiled).close()
            found.append((time.process_time() - start) * 1e3)
    return round(min(times[0]), 3), round(min(times[1]), 3)
