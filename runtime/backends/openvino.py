"""The openvino backend: the fastest on the vision encoders of CPUs with VNNI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError, BundleError, option
from blip2edge.runtime.backends.base import Settled


class OpenVinoSession:
    """A graph in OpenVINO on the CPU; it follows :class:`blip2edge.runtime.backends.base.Session`.

    Args:
        path: The ``.onnx`` file, whose weights may lie beside it; or what :meth:`export` gave.
        threads: Threads; None leaves the choice to OpenVINO.
        compiled: Whether the file is of :meth:`export`.

    Raises:
        BackendError: openvino is not installed.
        BundleError: The file is no graph that it can run.
    """

    def __init__(self, path: Path, threads: int | None = None, *, compiled: bool = False) -> None:
        try:
            import openvino
        except ImportError as error:
            raise BackendError(
                "the openvino backend needs openvino, which is not installed",
                'install it: pip install "blip2edge[openvino]"',
            ) from error
        # float32 as the graph says: without the hint it computes in bfloat16 where the CPU has that.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        try:
            if compiled:
                # Weights are used where they are mapped: the mapping has to stay as long as the model.
                self._mapped: Any = openvino.Tensor(np.memmap(path, np.uint8, "c"), shared_memory=True)
                self._model: Any = core.import_model(self._mapped, "CPU", options)
            else:
                self._model = core.compile_model(str(path), "CPU", options)
        except (RuntimeError, TypeError, ValueError) as error:  # TypeError: before 2025.3 it takes no tensor
            reason = str(error).strip().splitlines()[0]
            raise BundleError(
                f"OpenVINO cannot load {path} ({reason})", f"use {option('backend')} cpu for this bundle"
            ) from error
        self._request: Any = self._model.create_infer_request()
        self.input_names = tuple(_name(port) for port in self._model.inputs)
        self.output_names = tuple(_name(port) for port in self._model.outputs)

    def export(self) -> bytes:
        """The graph as OpenVINO has compiled it, for the same version on the same processor; weights included."""
        found: bytes = self._model.export_model().getvalue()
        return found

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """See :class:`blip2edge.runtime.backends.base.Session`."""
        given = {name: np.ascontiguousarray(inputs[name]) for name in self.input_names}
        found = self._request.infer(given, share_inputs=True, share_outputs=False)
        names = self.output_names if outputs is None else outputs
        return {name: np.array(found[name]) for name in names}

    def close(self) -> None:
        """See :class:`blip2edge.runtime.backends.base.Session`."""
        del self._request, self._model
        self._mapped = None


def _name(port: Any) -> str:
    """The name of the graph's file among a port's names."""
    return str(port.get_any_name())


def open_graph(path: Path, threads: int | None = None, settled: Settled | None = None) -> OpenVinoSession:
    """Loads a graph, portable or (settled) compiled; OpenVINO's own files know where their weights are."""
    return OpenVinoSession(path, threads, compiled=settled is not None)
