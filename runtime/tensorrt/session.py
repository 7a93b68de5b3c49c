"""Imports TensorRT on first use, checks its version, and opens and runs engines."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.outputs.locks import BusyError, write_file
from blip2edge.bundle.schema import TensorSpec
from blip2edge.errors import EngineError, option
from blip2edge.packages import require
from blip2edge.runtime.backends.base import closed_graph
from blip2edge.runtime.backends.engine_files import EngineRecord
from blip2edge.runtime.tensorrt.cuda import Cuda, DeviceBuffer, Mirror

PIECE = 1 << 24  # bytes of an engine's file read at a time
OLDEST = (10, 3)  # JetPack 6.1; older versions have no strongly typed networks
MOST_MESSAGES = 256  # of TensorRT that are kept, so that a server's memory does not grow
JETSON = Path("/etc/nv_tegra_release")
"""A file that exists on every Jetson, and on no other machine."""


@dataclass(frozen=True)
class Target:
    """An edition of TensorRT: ``tensorrt`` or ``rtx``.

    Attributes:
        module: Name of the edition's Python module.
        builds_anywhere: Whether this edition can build engines for other GPUs, on a machine without a GPU.
    """

    module: str
    builds_anywhere: bool = False


TARGETS = {
    "tensorrt": Target("tensorrt"),
    "rtx": Target("tensorrt_rtx", builds_anywhere=True),
}


def load_tensorrt(target: str) -> Any:
    """Imports the Python module of TensorRT for a target, ``tensorrt`` or ``rtx``.

    Raises:
        EngineError: The module is not installed, cannot be loaded, or is too old.
    """
    jetson = "; on a Jetson it comes with JetPack: create the environment with --system-site-packages"
    hint = jetson if target == "tensorrt" else ""
    trt = require(TARGETS[target].module, f"the target {target}", EngineError, hint=hint)
    if target == "tensorrt" and version_of(trt) < OLDEST:
        raise EngineError(
            f"expected TensorRT 10.3 or newer, got {trt.__version__}",
            "upgrade to JetPack 6.1 or newer, which brings 10.3, or install tensorrt>=10.3",
        )
    return trt


def version_of(trt: Any) -> tuple[int, int]:
    """Returns major and minor version number of TensorRT."""
    major, minor = str(trt.__version__).split(".")[:2]
    return int(major), int(minor)


def make_logger(trt: Any) -> tuple[Any, deque[str]]:
    """Makes a TensorRT logger; returns the logger, and a deque into which it puts the last warnings and errors."""
    messages: deque[str] = deque(maxlen=MOST_MESSAGES)

    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is known at run time only
        """Stores TensorRT's warnings and errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Stores a message from TensorRT if its severity is 0 (internal error), 1 (error) or 2 (warning)."""
            if int(severity) <= int(trt.ILogger.WARNING):
                messages.append(" ".join(message.split()))

    return Logger(), messages


class Lane:
    """A CUDA stream, and scratch memory for the engines that run in this stream, one after another.

    Args:
        cuda: The CUDA runtime.

    Attributes:
        stream: The CUDA stream.
        lock: A thread must hold this lock while it adds work to the stream or uses buffers that engines share.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.stream = cuda.stream()
        self.lock = threading.RLock()
        self._scratch: list[DeviceBuffer] = []
        self._most = 0

    def reserve(self, size: int) -> None:
        """Makes :attr:`scratch` at least ``size`` bytes large from its next use on."""
        self._most = max(self._most, size)

    @property
    def scratch(self) -> DeviceBuffer:
        """Returns the scratch memory that all execution contexts of the lane share.

        If it is too small, a larger buffer is allocated. The old one is freed only by :meth:`close`, because CUDA
        graphs contain its address.
        """
        if not self._scratch or self._scratch[-1].size < self._most:
            self._scratch.append(DeviceBuffer(self.cuda, self._most))
        return self._scratch[-1]

    def synchronize(self) -> None:
        """Waits until all work in the stream is done."""
        self.cuda.synchronize(self.stream)

    def close(self) -> None:
        """Waits until the work in the stream is done, then frees the scratch memory and the stream."""
        self.synchronize()
        for buffer in self._scratch:
            buffer.free()
        self._scratch.clear()
        self.cuda.destroy_stream(self.stream)


class Device:
    """What all engines of a bundle share: TensorRT, CUDA, and two lanes (CUDA streams with scratch memory).

    Because of the two lanes, a picture can be encoded while another picture's caption is decoded.

    Args:
        trt: TensorRT's Python module.
        cuda: The CUDA runtime.
        kernels: File for the kernels that TensorRT for RTX compiles in the first run of an engine; None if they are
            not stored.

    Attributes:
        encoding: The lane of all engines that do not use ``decoding``.
        decoding: The lane of the decoder and of the engine that chooses tokens.
    """

    def __init__(self, trt: Any, cuda: Cuda, kernels: Path | None = None) -> None:
        self.trt = trt
        self.cuda = cuda
        self.logger, self.messages = make_logger(trt)
        self.runtime = trt.Runtime(self.logger)
        self.encoding, self.decoding = Lane(cuda), Lane(cuda)
        self._kernels = kernels
        self._compiled: Any = None

    def open(self, path: Path, *, host_code: bool = False) -> Any:
        """Loads an engine from its file: piece by piece if this TensorRT version can, else by mapping the file.

        Args:
            path: The engine file.
            host_code: Whether the engine may contain code for the CPU, as version-compatible engines do.

        Raises:
            EngineError: TensorRT cannot load the engine.
        """
        if host_code:
            self.runtime.engine_host_code_allowed = True
        if hasattr(self.trt, "IStreamReaderV2"):
            with path.open("rb") as file:
                engine = self.runtime.deserialize_cuda_engine(_reader(self.trt, file))
        else:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            said = self.messages[-1] if self.messages else "no reason given"
            raise EngineError(f"TensorRT cannot open {path} ({said})", "build the engines again on this machine")
        return engine

    def context(self, engine: Any) -> Any:
        """Creates an execution context without scratch memory of its own; None if there is not enough memory.

        TensorRT for RTX compiles kernels for the shapes of a first run. It is told to wait for these kernels, so that a
        CUDA graph can be captured afterwards. :meth:`close` writes the kernels to a file.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialization = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is None:
            return engine.create_execution_context(strategy)
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(strategy)
        runtime_config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        if self._compiled is None:
            self._compiled = runtime_config.create_runtime_cache()
            if self._kernels is not None and self._kernels.is_file():
                self._compiled.deserialize(self._kernels.read_bytes())
        runtime_config.set_runtime_cache(self._compiled)
        return engine.create_execution_context(runtime_config)

    def close(self) -> None:
        """Waits until the work in both lanes is done, frees the lanes, and writes the compiled kernels to a file."""
        for lane in (self.encoding, self.decoding):
            lane.close()
        if self._compiled is not None and self._kernels is not None:
            content = self._compiled.serialize()
            with suppress(OSError, BusyError):  # the cache may be read-only; the kernels are compiled again then
                self._kernels.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._kernels, memoryview(content))


def _reader(trt: Any, file: BinaryIO) -> Any:
    """Makes an object (TensorRT's ``IStreamReaderV2``) through which TensorRT reads an open file."""
    whence = {trt.SeekPosition.SET: 0, trt.SeekPosition.CUR: 1, trt.SeekPosition.END: 2}

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc]  # known at run time only
        """Reads a file in pieces."""

        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, _: int) -> bytes:
            """Reads at most ``num_bytes`` bytes; if fewer are returned, TensorRT calls the method again."""
            return file.read(min(num_bytes, PIECE))

        def seek(self, offset: int, where: Any) -> bool:
            """Moves the position in the file; always returns True."""
            file.seek(offset, whence[where])
            return True

    return Reader()


class Context:
    """An engine's execution context for one optimization profile; it runs the engine in a lane.

    Args:
        device: The device that the engine runs on.
        lane: The lane that the engine runs in.
        engine: The deserialised engine.
        record: The engine's record in ``engine.json``.
        profile: Name of the optimization profile.
    """

    def __init__(self, device: Device, lane: Lane, engine: Any, record: EngineRecord, profile: str) -> None:
        self._device, self._lane = device, lane
        self._name = record.spec.name
        self._context = device.context(engine)
        if self._context is None:
            raise EngineError(
                f"the GPU has too little free memory to run the engine {self._name}",
                "stop other programs that use the GPU, or build the engines again with a smaller "
                f"{option('capacity')} or {option('max_batch')}",
            )
        self._size = int(engine.device_memory_size_v2)
        lane.reserve(self._size)
        index = record.profiles.index(profile)
        if not self._context.set_optimization_profile_async(index, lane.stream):
            raise EngineError(f"the engine {self._name} has no profile {profile}", "build the engines again")

    def bind(self, name: str, address: int, shape: Sequence[int] | None = None) -> None:
        """Sets the GPU address of the tensor ``name`` and, for an input, its shape.

        Raises:
            EngineError: The engine was not built for that shape.
        """
        if shape is not None and not self._context.set_input_shape(name, tuple(shape)):
            raise EngineError(
                f"the engine {self._name} was not built for {name} of shape {list(shape)}",
                f"build the engines again with a larger {option('capacity')} or {option('max_batch')}, "
                f"or lower {option('batch_size')}",
            )
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"the engine {self._name} has no tensor {name}", "build the engines again")

    @property
    def can_be_captured(self) -> bool:
        """Returns whether a run of the engine can be captured in a CUDA graph.

        TensorRT for RTX has a function that says so. TensorRT has none; runs of its engines can always be captured.
        """
        check = getattr(self._context, "is_stream_capturable", None)
        return True if check is None else bool(check(self._lane.stream))

    def enqueue(self) -> None:
        """Adds a run of the engine to the lane's stream.

        Raises:
            EngineError: TensorRT cannot start the run.
        """
        self._context.set_device_memory(self._lane.scratch.address, self._size)
        if not self._context.execute_async_v3(self._lane.stream):
            said = self._device.messages[-1] if self._device.messages else "no reason given"
            raise EngineError(f"the engine {self._name} did not run ({said})", "see `blip2edge doctor`")


class TrtSession:
    """Runs an engine on NumPy arrays; implements the ``Session`` protocol of ``base.py``.

    All calls use the same buffers, so each call holds the lane's lock until its results are copied.

    Args:
        device: The device that the engine runs on.
        engine: The deserialised engine.
        record: The engine's record in ``engine.json``.
        lane: The lane that the engine runs in; None for ``device.encoding``.
    """

    def __init__(self, device: Device, engine: Any, record: EngineRecord, lane: Lane | None = None) -> None:
        self._device = device
        self._lane = lane or device.encoding
        self._spec = record.spec
        self.input_names = tuple(tensor.name for tensor in record.spec.inputs)
        self.output_names = tuple(tensor.name for tensor in record.spec.outputs)
        self._make = partial(Context, device, self._lane, engine, record, record.profiles[0])
        self._context: Context | None = None
        self._mirrors: dict[str, Mirror] = {}
        self.closed = False

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs the graph; returns the outputs by name; see :class:`blip2edge.runtime.backends.base.Session`."""
        if self.closed:
            raise closed_graph()
        lane = self._lane
        with lane.lock:
            if self._context is None:
                self._context = self._make()
            context = self._context
            sizes = self._spec.lengths({name: array.shape for name, array in inputs.items()})
            for tensor in self._spec.inputs:
                mirror = self._mirror(tensor, tensor.shape(sizes))
                mirror.put(inputs[tensor.name], lane.stream)
                context.bind(tensor.name, mirror.address, inputs[tensor.name].shape)
            for tensor in self._spec.outputs:
                context.bind(tensor.name, self._mirror(tensor, tensor.shape(sizes)).address)
            context.enqueue()
            wanted = self.output_names if outputs is None else outputs
            shapes = {tensor.name: tensor.shape(sizes) for tensor in self._spec.outputs}
            views = {name: self._mirrors[name].fetch(shapes[name], lane.stream) for name in wanted}
            lane.synchronize()
            return {name: view.copy() for name, view in views.items()}

    def close(self) -> None:
        """Frees the session's buffers; see :class:`blip2edge.runtime.backends.base.Session`."""
        if not self.closed:
            self._lane.synchronize()
        self.closed = True
        self._context = None
        for mirror in self._mirrors.values():
            mirror.free()
        self._mirrors.clear()

    def _mirror(self, tensor: TensorSpec, shape: tuple[int, ...]) -> Mirror:
        """Returns the buffer of a tensor; if there is none, or it is too small for ``shape``, makes a new one."""
        known = self._mirrors.get(tensor.name)
        if known is not None and known.holds(shape):
            return known
        if known is not None:
            self._mirrors.pop(tensor.name).free()  # forgotten first: memory may run out
        made = self._mirrors[tensor.name] = Mirror(self._device.cuda, shape, NUMPY_DTYPES[tensor.dtype])
        return made
