"""Engines that compute in ONNX Runtime on the CPU, and read and write the memory of a real GPU through CUDA.

``benchmarks/gpu.py`` runs the TensorRT runtime with them: everything but the engines themselves is then real.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np

from blip2edge.bundle.dtypes import NUMPY_DTYPES
from blip2edge.runtime.tensorrt import backend as tensorrt_backend
from blip2edge.runtime.tensorrt.cuda import load_cuda
from tests.engine.fake_engines import Patcher
from tests.engine.fake_gpu import VERSION, FakeContext, FakeCuda, FakeEngine, fake_tensorrt


class HostContext(FakeContext):
    """Runs the engine at once: waits for the stream, copies the inputs to the host and the outputs to the GPU."""

    def execute_async_v3(self, stream: int) -> bool:
        engine: Any = self.engine
        api = engine.api
        api.cudaStreamSynchronize(stream)
        kind = api.cudaMemcpyKind.cudaMemcpyDefault
        feeds = {}
        for name, dtype in engine.inputs.items():
            array = np.empty(self.shapes[name], NUMPY_DTYPES[dtype])
            api.cudaMemcpy(array.ctypes.data, self.addresses[name], array.nbytes, kind)
            feeds[name] = array
        for name, result in zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True):
            array = np.ascontiguousarray(result)
            api.cudaMemcpy(self.addresses[name], array.ctypes.data, array.nbytes, kind)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        """The host computes, so no graph can be captured."""
        return False


class HostEngine(FakeEngine):
    """``ICudaEngine``."""

    api: Any = None

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user"
        return HostContext(self)


class Patches(ExitStack):
    """Replaces attributes until the block ends, where pytest is not installed."""

    def setattr(self, *arguments: Any) -> None:
        """Replaces an attribute: an object, a name and a value, or a dotted name and a value."""
        self.enter_context(mock.patch.object(*arguments) if len(arguments) == 3 else mock.patch(*arguments))


def plug_in(patches: Patcher) -> None:
    """Puts these engines in the place of TensorRT; CUDA and the driver stay real."""
    HostEngine.api = load_cuda()
    patches.setattr("tests.engine.fake_gpu.FakeEngine", HostEngine)
    trt = fake_tensorrt(FakeCuda(), VERSION)
    patches.setattr(tensorrt_backend, "load_tensorrt", lambda target: trt)
