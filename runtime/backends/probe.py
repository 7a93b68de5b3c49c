"""What this machine computes on: its processor and the cores of it that are ours."""

from __future__ import annotations

import base64
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

CPUINFO = Path("/proc/cpuinfo")

NAMES = ("model name", "Model")
"""Whose value is the processor's name, or on Arm the board's."""

NUMBERS = (
    *("cpu family", "model", "stepping"),
    *("CPU implementer", "CPU variant", "CPU part", "CPU revision"),
)
"""What tells generations apart that go by one name: as x86 says it, then Arm."""


def cores() -> int:
    """The cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system: all there are
        return os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as a person reads it."""
    return _named(facts())


def exact_processor() -> str:
    """The same with the numbers of its generation: virtual machines call several of them ``AMD EPYC``."""
    told = facts()
    numbers = ", ".join(
        f"{key.removeprefix('cpu ').removeprefix('CPU ')} {told[key]}" for key in NUMBERS if key in told
    )
    return f"{_named(told)} ({numbers})" if numbers else _named(told)


def facts() -> dict[str, str]:
    """What the system tells of its first core, by its own names; nothing where it tells nothing."""
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        told.setdefault(key, value)
    return told


def _named(told: dict[str, str]) -> str:
    names = (told[key] for key in NAMES if told.get(key))
    return next(names, platform.processor() or platform.machine())


# One MatMul, c[m,m] = a[m,m] · b[m,m] in float32, IR version 8, opset 17, 101 bytes. Made with onnx 1.23:
#   value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", "m"])
#   graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "k", [value("a"), value("b")],
#                             [value("c")])
#   helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
MATMUL_MODEL = base64.b64decode(
    "CAg6WwoRCgFhCgFiEgFjIgZNYXRNdWwSAWtaFQoBYRIQCg4IARIKCgMSAW0KAxIBbVoVCgFiEhAKDggBEgoKAxIBbQoDEgFtYhUKAWMS"
    "EAoOCAESCgoDEgFtCgMSAW1CBAoAEBE="
)
MATMUL_WIDTH = 64  # rows and columns of the trial
MATMUL_TOLERANCE = 2e-2  # relative; a GPU may multiply in TF32, with 10 bits of mantissa


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        ok: Whether it is there and works.
        detail: What was found, in one line.
        fix: What brings it, where something does.
        required: Whether captions are impossible without it.
    """

    name: str
    ok: bool
    detail: str
    fix: str | None = None
    required: bool = False


def check_provider(ort: ModuleType, name: str) -> Check:
    """Run one MatMul on one provider, with the fallback to the CPU switched off."""
    options: Any = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: the reason of a failure is in the exception
    options.intra_op_num_threads = 1
    required = name == "CPUExecutionProvider"
    if not required:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session: Any = ort.InferenceSession(MATMUL_MODEL, options, providers=[name])
        if session.get_providers()[0] != name:
            return Check(
                name, False, "named, but not there: the session fell back", _provider_fix(name), required
            )
        generator = np.random.default_rng(0)
        left = generator.standard_normal((MATMUL_WIDTH, MATMUL_WIDTH), dtype=np.float32)
        right = generator.standard_normal((MATMUL_WIDTH, MATMUL_WIDTH), dtype=np.float32)
        product = session.run(None, {"a": left, "b": right})[0]
    except Exception as error:  # noqa: BLE001 - its classes differ by version; any is a finding
        return Check(name, False, f"named, but fails: {one_line(error)}", _provider_fix(name), required)
    wanted = left @ right
    error_size = float(np.abs(product - wanted).max() / np.abs(wanted).max())
    if not error_size <= MATMUL_TOLERANCE:  # NaN fails as well
        return Check(
            name, False, f"runs, but is wrong by {error_size:.1e} of the largest value", None, required
        )
    agreement = f"within {error_size:.0e} of NumPy's" if error_size else "equal to NumPy's"
    detail = f"multiplied two {MATMUL_WIDTH} x {MATMUL_WIDTH} matrices, {agreement}"
    return Check(name, True, detail, None, required)


def _provider_fix(name: str) -> str | None:
    if name in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        return "install the NVIDIA driver and the CUDA version that this onnxruntime-gpu was built for"
    return None


def one_line(error: BaseException) -> str:
    """The message of an error in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
