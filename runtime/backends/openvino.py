"""The backend ``openvino``: runs graphs on the CPU with OpenVINO; the fastest for vision encoders on CPUs with VNNI."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError, BundleError, one_line, option
from blip2edge.packages import require
from blip2edge.runtime.backends.base import RUN_FIX, OptimizedFile, closed_graph


class OpenVinoSession:
    """A graph in OpenVINO on the CPU; implements :class:`blip2edge.runtime.backends.base.Session`.

    OpenVINO's infer request contains the buffers of one run. So each running call has its own request: an idle request
    is used again, and if all requests are running, a new request is made.

    Args:
        path: The ``.onnx`` file, whose weights may be in a data file; or a file with the bytes of :meth:`export`.
        threads: CPU threads; None leaves the choice to OpenVINO.
        compiled: Whether the file contains the bytes of :meth:`export`.

    Raises:
        BackendError: openvino is not installed.
        BundleError: OpenVINO cannot load the file.
    """

    def __init__(self, path: Path, threads: int | None = None, *, compiled: bool = False) -> None:
        openvino = require("openvino", "the openvino backend", BackendError)
        # Computes in float32 like the graph: without the hint, OpenVINO uses bfloat16 on CPUs that support it.
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
                model = _with_float32_ports(openvino, core.read_model(str(path)))
                self._model = core.compile_model(model, "CPU", options)
        except (RuntimeError, TypeError, ValueError) as error:  # TypeError: before 2025.3 it takes no tensor
            raise BundleError(
                f"OpenVINO cannot load {path} ({one_line(error)})",
                f"use {option('backend')} cpu for this bundle",
            ) from error
        self._idle: deque[Any] = deque()
        self.input_names = tuple(_name(port) for port in self._model.inputs)
        self.output_names = tuple(_name(port) for port in self._model.outputs)

    def export(self) -> bytes:
        """Returns the compiled graph with its weights as bytes, for this OpenVINO version and this processor only."""
        found: bytes = self._model.export_model().getvalue()
        return found

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs the graph; returns the outputs by name; see :class:`blip2edge.runtime.backends.base.Session`."""
        if self._model is None:
            raise closed_graph()
        given = {name: np.ascontiguousarray(inputs[name]) for name in self.input_names}
        names = self.output_names if outputs is None else outputs
        try:
            request = self._idle.pop()
        except IndexError:  # all are running
            request = self._model.create_infer_request()
        try:
            shared = request.infer(given, share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO cannot run the graph ({one_line(error)})",
                RUN_FIX,
            ) from error
        found = {name: np.array(shared[name]) for name in names}  # the request's next run overwrites its own
        self._idle.append(request)
        return found

    def close(self) -> None:
        """Releases the graph and its memory; see :class:`blip2edge.runtime.backends.base.Session`."""
        self._idle.clear()
        self._model = self._mapped = None


def _with_float32_ports(openvino: Any, model: Any) -> Any:
    """Replaces bfloat16 inputs and outputs by float32, because NumPy has no bfloat16; returns the graph."""
    bf16, float32 = openvino.Type.bf16, openvino.Type.f32
    if all(port.get_element_type() != bf16 for port in (*model.inputs, *model.outputs)):
        return model
    converter = openvino.preprocess.PrePostProcessor(model)
    for ports, select in ((model.inputs, converter.input), (model.outputs, converter.output)):
        for index, port in enumerate(ports):
            if port.get_element_type() == bf16:
                select(index).tensor().set_element_type(float32)
    return converter.build()


def _name(port: Any) -> str:
    """Returns the ONNX name of an input or output ("port"), to which OpenVINO may give several names."""
    return str(port.get_any_name())


def open_graph(path: Path, threads: int | None = None, optimized: OptimizedFile | None = None) -> OpenVinoSession:
    """Loads an exported graph or, with ``optimized``, a compiled graph that contains its own weights."""
    return OpenVinoSession(path, threads, compiled=optimized is not None)
