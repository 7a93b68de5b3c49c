"""A simulated GPU: CUDA's runtime and TensorRT's bindings, with strict checks, computed in ONNX Runtime.

All calls are asynchronous: copies, fills, runs and events wait in a stream's queue until the stream is synchronised. So
a buffer that is overwritten or read too early gives wrong tokens. New memory has all bits set: NaN in every float. Like
CUDA, it may be called from several threads; a stream keeps the order of its calls.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from blip2edge.bundle.dtypes import NUMPY_DTYPES

OK, INVALID = 0, 1
VERSION = "10.13.3"
Work = Callable[[], None]


class FakeCuda:
    """The functions of ``cuda.bindings.runtime`` that the project calls, by name."""

    cudaHostAllocDefault, cudaHostAllocMapped = 0, 2  # noqa: N815
    cudaStreamNonBlocking, cudaEventDisableTiming = 1, 2  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, integrated: bool = False) -> None:
        self.integrated = integrated
        self.memory: dict[int, Any] = {}
        self.queues: dict[int, list[Work]] = {}
        self.captured: list[Work] | None = None
        self.graphs: dict[int, list[Work]] = {}
        self.made = 0
        self.marks: dict[int, tuple[int, bool]] = {}
        self.asked: list[str] = []
        self.last_stream = 0
        self.running = threading.RLock()

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:  # noqa: N802
        return OK, SimpleNamespace(integrated=int(self.integrated))

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return OK, b"out of memory" if status == 2 else b"invalid argument"

    def _new(self, size: int) -> int:
        buffer = (ctypes.c_uint8 * size).from_buffer_copy(b"\xff" * size)
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return address

    def cudaMalloc(self, size: int) -> tuple[int, ...]:  # noqa: N802
        return (INVALID,) if self.captured is not None else (OK, self._new(size))

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, ...]:  # noqa: N802
        return (INVALID,) if self.captured is not None else (OK, self._new(size))

    def cudaHostGetDevicePointer(self, address: int, flags: int) -> tuple[int, int]:  # noqa: N802
        return (OK, address) if self.integrated else (INVALID, 0)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        return (OK if self.memory.pop(address, None) is not None else INVALID,)

    cudaFreeHost = cudaFree  # noqa: N815

    def holds(self, address: int, size: int) -> bool:
        """Whether bytes lie within one allocation."""
        buffers = list(self.memory.items())  # other threads allocate and free meanwhile
        return any(start <= address and address + size <= start + len(buffer) for start, buffer in buffers)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        self.last_stream += 1
        self.queues[self.last_stream] = []
        return OK, self.last_stream

    def ask(self, stream: int, name: str, work: Work) -> None:
        """Puts work behind what the stream has to do."""
        self.asked.append(name)
        (self.queues[stream] if self.captured is None else self.captured).append(work)

    def drain(self, stream: int, until: Callable[[], bool] = lambda: False) -> None:
        """Does what the stream has to do."""
        with self.running:
            while self.queues[stream] and not until():
                self.queues[stream].pop(0)()

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        if self.captured is not None:
            return (INVALID,)
        self.drain(stream)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        if not (self.holds(target, size) and self.holds(source, size)):
            return (INVALID,)
        self.ask(stream, "copy", lambda: ctypes.memmove(target, source, size))  # type: ignore[arg-type]
        return (OK,)

    def cudaMemcpy2DAsync(  # noqa: N802
        self, target: int, to: int, source: int, by: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[int]:
        if width > min(to, by) or not (
            self.holds(target, to * (height - 1) + width) and self.holds(source, by * (height - 1) + width)
        ):
            return (INVALID,)

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(target + row * to, source + row * by, width)

        self.ask(stream, "copy rows", copy)
        return (OK,)

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> tuple[int]:  # noqa: N802
        if not self.holds(target, size):
            return (INVALID,)
        self.ask(stream, "fill", lambda: ctypes.memset(target, value, size))  # type: ignore[arg-type]
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        self.made += 1
        self.marks[self.made] = (0, True)
        return OK, self.made

    def cudaEventDestroy(self, event: int) -> tuple[int]:  # noqa: N802
        return (OK if self.marks.pop(event, None) is not None else INVALID,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        return (OK if self.queues.pop(stream, None) == [] else INVALID,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[int]:  # noqa: N802
        return (OK if self.graphs.pop(graph, None) is not None else INVALID,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:  # noqa: N802
        self.marks[event] = (stream, False)

        def mark() -> None:
            self.marks[event] = (stream, True)

        self.ask(stream, "mark", mark)
        return (OK,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:  # noqa: N802
        stream, done = self.marks[event]
        if not done:
            self.drain(stream, lambda: self.marks[event][1])
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, list[Work]]:  # noqa: N802
        work, self.captured = self.captured or [], None
        return OK, work

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, int]:  # noqa: N802
        self.made += 1
        self.graphs[self.made] = list(graph)
        return OK, self.made

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[int]:  # noqa: N802
        return (OK,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:  # noqa: N802
        for work in self.graphs[graph]:
            self.ask(stream, "replay", work)
        return (OK,)


class FakeContext:
    """``IExecutionContext``."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0
        self.ran_in: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return 0 <= index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        bounds = self.engine.profiles[self.profile or 0].get(name)
        if self.profile is None or name not in self.engine.inputs:
            return False
        if bounds is not None and not all(
            low <= length <= high for low, length, high in zip(bounds[0], shape, bounds[2], strict=True)
        ):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.inputs or name in self.engine.outputs

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.memory = address

    def execute_async_v3(self, stream: int) -> bool:
        cuda, engine = self.engine.cuda, self.engine
        ready = set(engine.inputs) <= set(self.shapes) and {*engine.inputs, *engine.outputs} <= set(self.addresses)
        if not ready or not cuda.holds(self.memory, engine.device_memory_size_v2):
            return False
        for name in engine.outputs:  # an output that is an input updated in place has its address, no other has any
            shared = {other for other in engine.inputs if self.addresses[other] == self.addresses[name]}
            assert shared == {engine.aliases[name]} - {None}, f"{name} shares its buffer with {shared}"
        if cuda.captured is not None and self.ran_in != self.shapes:
            return False  # "enqueue once before capturing, after shapes have changed"
        self.ran_in = dict(self.shapes)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        cuda.ask(stream, f"run {engine.name}", lambda: engine.compute(shapes, addresses))
        return True


class FakeEngine:
    """``ICudaEngine``: an ONNX graph and the ranges of shapes that it was built for."""

    device_memory_size_v2 = 64

    def __init__(self, cuda: FakeCuda, content: dict[str, Any]) -> None:
        self.cuda, self.name, self.profiles = cuda, content["name"], content["profiles"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(content["onnx"], options, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = content["inputs"], content["outputs"]
        self.aliases: dict[str, str | None] = {name: content["aliases"].get(name) for name in self.outputs}

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user"
        return FakeContext(self)

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Reads the inputs where they lie, and writes the outputs."""
        feeds = {
            name: self._at(addresses[name], shapes[name], NUMPY_DTYPES[dtype]).copy()
            for name, dtype in self.inputs.items()
        }
        for name, result in zip(self.outputs, self.session.run(list(self.outputs), feeds), strict=True):
            self._at(addresses[name], result.shape, result.dtype)[...] = result

    def _at(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        count = int(np.prod(shape))
        size = count * dtype.itemsize
        assert self.cuda.holds(address, size), f"{self.name} reaches beyond a buffer"
        return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(address)), dtype, count).reshape(shape)


def fake_tensorrt(cuda: FakeCuda, version: str = VERSION, streamed: bool = True) -> Any:
    """The module ``tensorrt``; without ``streamed`` it has no ``IStreamReaderV2``, as 10.3."""
    read: list[int] = []

    class ILogger:
        WARNING = 2

    class IStreamReaderV2:
        pass

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: ILogger) -> None:
            self.logger: Any = logger

        def deserialize_cuda_engine(self, source: Any) -> FakeEngine | None:
            data = self._streamed(source) if isinstance(source, IStreamReaderV2) else bytes(source)
            try:
                return FakeEngine(cuda, json.loads(data))
            except ValueError:
                self.logger.log(1, "the plan file is broken")
                return None

        def _streamed(self, reader: Any) -> bytes:
            """As the bindings' docstring says: ``read(self, num_bytes: int, stream: int) -> bytes``."""
            data = b""
            assert reader.seek(0, SeekPosition.SET)
            while piece := reader.read(100, 0):
                assert type(piece) is bytes
                read.append(len(piece))
                data += piece
            return data

    SeekPosition = SimpleNamespace(SET=0, CUR=1, END=2)  # noqa: N806
    names: dict[str, Any] = {
        "__version__": version,
        "ILogger": ILogger,
        "Runtime": Runtime,
        "ExecutionContextAllocationStrategy": SimpleNamespace(USER_MANAGED="user"),
        "pieces": read,
    }
    if streamed:
        names |= {"IStreamReaderV2": IStreamReaderV2, "SeekPosition": SeekPosition}
    return SimpleNamespace(**names)


def write_fake_engine(path: Path, graph: Path, spec: Any, profiles: list[dict[str, Any]]) -> None:
    """A file that :class:`FakeEngine` opens."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    scatters = [node for node in nodes if node.op_type == "TensorScatter"]
    content = {
        "aliases": {node.output[0]: node.input[0] for node in scatters},
        "name": spec.name,
        "onnx": str(graph),
        "profiles": profiles,
        "inputs": {tensor.name: tensor.dtype for tensor in spec.inputs},
        "outputs": {tensor.name: tensor.dtype for tensor in spec.outputs},
    }
    path.write_text(json.dumps(content))
