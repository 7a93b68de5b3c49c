"""What OpenVINO has compiled of a graph, as a file: opened without being compiled again.

Such a file holds the weights as well, and belongs to one version of OpenVINO and one processor.
"""

from __future__ import annotations

import time
from pathlib import Path

from blip2edge.runtime.backends.openvino import OpenVinoSession

ROUNDS = 3
"""Openings that are timed of each kind, in turn; the least counts."""


def compile_to(graph: Path, blob: Path) -> tuple[float, float]:
    """Writes a graph as OpenVINO has compiled it.

    Args:
        graph: The portable ``.onnx`` file.
        blob: The file to be written.

    Returns:
        Milliseconds of CPU time that opening takes, of the graph and of the file.

    Raises:
        BackendError: openvino is not installed.
        BundleError: OpenVINO cannot load the graph, or not what it has compiled of it; no file is left.
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
