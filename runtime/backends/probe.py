"""Detects processor, cores, NVIDIA driver, GPUs and execution providers, and checks that they work.

:func:`onnx_model` makes the small ONNX models with which providers are tested.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import one_line
from blip2edge.packages import pip_command

ELEMENT_TYPES: Mapping[str, int] = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "float16": 10,
}
"""Numbers of the element types in ONNX (``TensorProto.DataType``), by NumPy's names."""

IR_VERSION, OPSET = 8, 17

TensorType = tuple[str, Sequence[int | str]]
"""dtype and shape of a tensor. A dimension is a number, or a name if its length can vary."""

Node = tuple[str, Sequence[str], str]
"""A node of a small ONNX model: operator, names of the inputs, name of the output. Attributes have their defaults."""


def onnx_model(
    nodes: Sequence[Node],
    inputs: Mapping[str, TensorType],
    output: tuple[str, TensorType],
    weights: Mapping[str, Array] | None = None,
) -> bytes:
    """Builds a small ONNX model and returns it as a serialised ``ModelProto`` of opset 17.

    Args:
        nodes: The model's nodes, in the order in which they run.
        inputs: The model's inputs by name.
        output: The model's only output.
        weights: Arrays that are stored in the model, by name.
    """
    graph = b""
    for operator, names, result in nodes:
        graph += _field(1, b"".join(_text(1, name) for name in names) + _text(2, result) + _text(4, operator))
    graph += _text(2, "graph")
    for name, values in (weights or {}).items():
        graph += _field(5, _weight(name, values))
    for name, kind in inputs.items():
        graph += _field(11, _value(name, kind))
    graph += _field(12, _value(*output))
    return _number(1, IR_VERSION) + _field(8, _text(1, "") + _number(2, OPSET)) + _field(7, graph)


def _weight(name: str, values: Array) -> bytes:
    """Encodes an array as an ONNX ``TensorProto``."""
    dims = b"".join(_number(1, size) for size in values.shape)
    return dims + _number(2, ELEMENT_TYPES[str(values.dtype)]) + _text(8, name) + _field(9, values.tobytes())


def _value(name: str, kind: TensorType) -> bytes:
    """Encodes name and type of a tensor as an ONNX ``ValueInfoProto``."""
    dtype, shape = kind
    dims = b"".join(_field(1, _text(2, dim) if isinstance(dim, str) else _number(1, dim)) for dim in shape)
    return _text(1, name) + _field(2, _field(1, _number(1, ELEMENT_TYPES[dtype]) + _field(2, dims)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _field(field, content.encode())


@cache
def gather_model(dtype: str) -> bytes:
    """Makes an ONNX model that selects rows: ``y = x[rows]``, with ``x [b, h, s, d]`` of dtype ``dtype``."""
    x, y = (dtype, ("b", "h", "s", "d")), (dtype, ("n", "h", "s", "d"))
    return onnx_model([("Gather", ("x", "rows"), "y")], {"x": x, "rows": ("int64", ("n",))}, ("y", y))


@cache
def slice_model(dtype: str) -> bytes:
    """Makes an ONNX model that cuts a slice out of ``x [b, h, s, d]``, which has dtype ``dtype``.

    The slice goes from ``first`` to ``end`` (exclusive) along ``axis``; these three inputs are int64 ``[1]``.
    """
    bounds = dict.fromkeys(("first", "end", "axis"), ("int64", (1,)))
    x, y = (dtype, ("b", "h", "s", "d")), (dtype, ("B", "H", "S", "D"))
    return onnx_model([("Slice", ("x", *bounds), "y")], {"x": x, **bounds}, ("y", y))


@cache
def pad_model(dtype: str) -> bytes:
    """Makes an ONNX model that pads with zeros on the device: ``y = Pad(x, pads)`` for ``x [b, h, s, d]``."""
    x, y = (dtype, ("b", "h", "s", "d")), (dtype, ("B", "H", "S", "D"))
    return onnx_model([("Pad", ("x", "pads"), "y")], {"x": x, "pads": ("int64", (8,))}, ("y", y))


if TYPE_CHECKING:
    from types import ModuleType

CPUINFO = Path("/proc/cpuinfo")

NAMES = ("model name", "Model")
"""Keys of ``/proc/cpuinfo`` with the name of the processor, or, on Arm, of the board."""

NUMBERS = (
    *("cpu family", "model", "stepping"),
    *("CPU implementer", "CPU variant", "CPU part", "CPU revision"),
)
"""Keys of ``/proc/cpuinfo`` whose values can differ between processors of the same name: first x86, then Arm."""


def cores() -> int:
    """Returns the number of cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system: all cores count
        return os.cpu_count() or 1


def processor() -> str:
    """Returns the processor's name, for example ``AMD EPYC``."""
    return _name_of(cpu_facts())


def exact_processor() -> str:
    """Returns the processor's name with family, model and stepping, because several processors have the same name."""
    found = cpu_facts()
    numbers = ", ".join(
        f"{key.removeprefix('cpu ').removeprefix('CPU ')} {found[key]}" for key in NUMBERS if key in found
    )
    return f"{_name_of(found)} ({numbers})" if numbers else _name_of(found)


def cpu_facts() -> dict[str, str]:
    """Returns the keys of ``/proc/cpuinfo``, each with the value for the first core; empty without such a file."""
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        found.setdefault(key, value)
    return found


def _name_of(found: dict[str, str]) -> str:
    names = (found[key] for key in NAMES if found.get(key))
    return next(names, platform.processor() or platform.machine())


@dataclass(frozen=True)
class Gpu:
    """A GPU with the properties that the NVIDIA driver reports.

    Attributes:
        name: Name of the GPU, for example ``NVIDIA L4``.
        compute_capability: Compute capability as one number: 89 means 8.9.
        multiprocessors: Number of multiprocessors (SM).
        memory_gib: Memory, rounded to GiB.
    """

    name: str
    compute_capability: int
    multiprocessors: int = 0
    memory_gib: int = 0


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        version: The newest CUDA version that the driver supports, for example ``12.6``; empty without a working driver.
        gpus: The GPUs whose properties the driver could read.
        problem: Why there is no driver or no GPU, or why a GPU could not be read; empty if everything works.
    """

    version: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


LIBCUDA = "libcuda.so.1"
COMPUTE_CAPABILITY = (75, 76)
"""Numbers of the attributes CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in ``cuda.h``."""

MULTIPROCESSORS = 16
"""Number of the attribute CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT in ``cuda.h``."""


def nvidia_driver() -> Driver:
    """Reads the version of the NVIDIA driver and its GPUs from libcuda."""
    try:
        cuda = ctypes.CDLL(LIBCUDA)
    except OSError:
        return Driver(problem=f"none: {LIBCUDA} is not there")
    status = cuda.cuInit(0)
    if status != 0:
        return Driver(problem=f"{LIBCUDA} is there, but cuInit fails with {status}")
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Driver(problem=f"{LIBCUDA} does not answer")
    supported = f"{version.value // 1000}.{version.value % 1000 // 10}"
    answers = [_gpu(cuda, index) for index in range(count.value)]
    silent = [answer for answer in answers if isinstance(answer, str)]
    gpus = tuple(answer for answer in answers if isinstance(answer, Gpu))
    return Driver(supported, gpus, ", ".join(silent) if answers else "no GPU")


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu | str:
    """Returns the properties of GPU number ``index``, or an error text if the driver cannot read them."""
    handle, major, minor, count = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    memory = ctypes.c_size_t(0)
    name = ctypes.create_string_buffer(128)
    failed = (
        cuda.cuDeviceGet(ctypes.byref(handle), index)
        or cuda.cuDeviceGetName(name, len(name), handle)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY[0], handle)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY[1], handle)
        or cuda.cuDeviceGetAttribute(ctypes.byref(count), MULTIPROCESSORS, handle)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    )
    if failed:
        return f"GPU {index} does not answer (error {failed})"
    capability, gib = 10 * major.value + minor.value, round(memory.value / 2**30)
    return Gpu(name.value.decode(errors="replace"), capability, count.value, gib)


@dataclass(frozen=True)
class Check:
    """The result of one check of ``blip2edge doctor``.

    Attributes:
        name: What was checked.
        ok: Whether the checked package or device is installed and works.
        detail: What was found, in one line.
        fix: What the user can do; None if there is nothing to do.
        required: Whether captioning is impossible if the check fails.
    """

    name: str
    ok: bool
    detail: str
    fix: str | None = None
    required: bool = False


_SQUARE = ("float32", ("m", "m"))
MATMUL = onnx_model([("MatMul", ("a", "b"), "c")], {"a": _SQUARE, "b": _SQUARE}, ("c", _SQUARE))
"""A small ONNX model that multiplies two matrices: ``c [m, m] = a [m, m] @ b [m, m]``."""

MATMUL_WIDTH = 64  # rows and columns of the trial
MATMUL_TOLERANCE = 2e-2  # relative; a GPU may multiply in TF32, with 10 bits of mantissa


def check_matmul(
    name: str,
    multiply: Callable[[Mapping[str, Array]], Array],
    fix: str | None = None,
    *,
    required: bool = False,
) -> Check:
    """Multiplies two matrices and compares the result with NumPy's result.

    Args:
        name: Name of the check.
        multiply: Runs :data:`MATMUL` on the inputs ``a`` and ``b``. If it raises an exception, the check fails.
        fix: What the user can do if the check fails.
        required: Whether captioning is impossible if the check fails.
    """
    generator = np.random.default_rng(0)
    left = generator.standard_normal((MATMUL_WIDTH, MATMUL_WIDTH), dtype=np.float32)
    right = generator.standard_normal((MATMUL_WIDTH, MATMUL_WIDTH), dtype=np.float32)
    try:
        product = multiply({"a": left, "b": right})
    except Exception as error:  # noqa: BLE001 - classes differ by package and version
        return Check(name, False, f"listed, but fails: {one_line(error)}", fix, required)
    wanted = left @ right
    error_size = float(np.abs(product - wanted).max() / np.abs(wanted).max())
    if not error_size <= MATMUL_TOLERANCE:  # NaN fails as well
        return Check(name, False, f"runs, but is wrong by {error_size:.1e} of the largest value", None, required)
    agreement = f"within {error_size:.0e} of NumPy's" if error_size else "equal to NumPy's"
    detail = f"multiplied two {MATMUL_WIDTH} x {MATMUL_WIDTH} matrices, {agreement}"
    return Check(name, True, detail, None, required)


def load_cuda_libraries(ort: ModuleType) -> None:
    """Loads CUDA and cuDNN from installed pip packages if they are not in the system's search path.

    ONNX Runtime has a function for this from 1.21 on; with earlier versions nothing is loaded. Messages of ONNX Runtime
    go to standard error.
    """
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(sys.stderr):
            ort.preload_dlls()


def check_provider(ort: ModuleType, name: str) -> Check:
    """Multiplies two matrices on an execution provider of ONNX Runtime; compares the result with NumPy's result.

    ONNX Runtime lists a provider also if its driver or libraries are missing, and then runs the graph on the CPU
    without a message. So the fallback to the CPU is switched off here. The check fails if the session cannot be made,
    if it uses another provider, if the run raises an exception, or if the result is wrong.

    Args:
        ort: The module ``onnxruntime``.
        name: The provider, for example ``CUDAExecutionProvider``.
    """

    def multiply(inputs: Mapping[str, Array]) -> Array:
        if name in GPU_PROVIDERS:
            load_cuda_libraries(ort)
        options: Any = ort.SessionOptions()
        options.log_severity_level = 4  # fatal only: the reason of a failure is in the exception
        options.intra_op_num_threads = 1
        if name != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session: Any = ort.InferenceSession(MATMUL, options, providers=[name])
        if session.get_providers()[0] != name:
            raise RuntimeError(f"the session fell back to {session.get_providers()[0]}")
        product: Array = session.run(None, dict(inputs))[0]
        return product

    fix = None
    if name in GPU_PROVIDERS:
        fix = f"install the NVIDIA driver, and {pip_command('gpu')}, which brings the CUDA libraries of onnxruntime-gpu"
    return check_matmul(name, multiply, fix, required=name == "CPUExecutionProvider")


GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")

COMPUTE = (
    *("MatMul", "Gemm", "Conv", "MatMulNBits", "FusedMatMul", "Softmax", "LayerNormalization", "Attention"),
    *("MultiHeadAttention", "GroupQueryAttention", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
)
"""Operators that must run on the GPU. ONNX Runtime puts nodes that compute shapes on the CPU, which is faster."""

RECORD_NODES = "session.record_ep_graph_assignment_info"
"""Session option with which ONNX Runtime records which execution provider runs each node."""


def count_nodes(session: Any) -> dict[str, dict[str, int]]:
    """Counts a session's nodes by provider and operator; empty if this version does not report providers."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    found: dict[str, dict[str, int]] = {}
    for part in session.get_provider_graph_assignment_info():
        kinds = found.setdefault(str(part.ep_name), {})
        for node in part.get_nodes():
            kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    return found
