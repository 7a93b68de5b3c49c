"""Running a graph: the protocol that every backend follows, and ONNX Runtime behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.errors import BackendError, BundleError, UsageError

Array = NDArray[Any]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int8": np.dtype(np.int8),
    "bool": np.dtype(np.bool_),
}


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Computes outputs.

        Args:
            inputs: Every input by name, in the dtype of the graph.
            outputs: Which outputs are wanted; None for all.

        Returns:
            The outputs by name.
        """


class OnnxRuntimeSession:
    """A graph in ONNX Runtime on the CPU.

    Args:
        path: The ``.onnx`` file; its weights may lie beside it.
        threads: Threads within an operator; None leaves the choice to ONNX Runtime.
        lean: Run the graph as it is written, with as little memory as that takes: no folded constants, no
            repacked weights, no arena. Slow; for checking a graph that is larger than the memory.

    Raises:
        BackendError: onnxruntime is not installed.
        BundleError: The file is no graph that it can run.
    """

    def __init__(self, path: Path, threads: int | None = None, *, lean: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                "the cpu backend needs onnxruntime, which is not installed",
                'install it: pip install "blip2edge[cpu]"',
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: a warning is no news for who captions
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        # An idle pool that spins takes the cores from the session that runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if lean:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            reason = str(error).strip().splitlines()[0]
            raise BundleError(
                f"ONNX Runtime cannot load {path} ({reason})", "export the checkpoint again"
            ) from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """See :class:`Session`."""
        names = self._outputs if outputs is None else list(outputs)
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


BACKENDS = {"cpu": OnnxRuntimeSession}
"""What ``--backend`` can name in this version; ``auto`` is the first."""


MOST_THREADS = 1024


def check_threads(threads: int | None) -> None:
    """Raises UsageError unless a number of threads is None or one that a machine can have."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"--threads must be from 1 to {MOST_THREADS}, not {threads}")


def open_session(path: Path, backend: str = "auto", threads: int | None = None) -> Session:
    """Loads a graph on a backend.

    Raises:
        BackendError: The backend is unknown or not there.
    """
    name = next(iter(BACKENDS)) if backend == "auto" else backend
    if name not in BACKENDS:
        raise BackendError(
            f"the backend {name} is not part of this version",
            f"use --backend auto or {' or '.join(BACKENDS)}",
        )
    return BACKENDS[name](path, threads)
