"""The errors of a build that TensorRT gave up, each with the advice that fits TensorRT's reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from blip2edge.engine.prepare import EnginePlan
from blip2edge.errors import EngineError, option

LESS_MEMORY = (
    f"lower {option('workspace')}, {option('capacity')} or {option('max_batch')}, add swap, or stop other programs on "
    "the board"
)

_OTHER_WAYS = (
    f"run the bundle there with {option('backend')} cuda, or build with {option('target')} tensorrt on the machine "
    "itself"
)


def _raise_workspace(plan: EnginePlan, workspace: int | None) -> str:  # noqa: ARG001
    if workspace is None:
        return f"lower {option('capacity')} or {option('max_batch')}"
    return f"raise {option('workspace')} above {workspace}, or leave it out"


def _only_fp16(plan: EnginePlan, workspace: int | None) -> str:  # noqa: ARG001
    if plan.needs_fp32:
        return f"no {option('precision')} changes this, because parts of this model stay in FP32; {_OTHER_WAYS}"
    return f"export the checkpoint with {option('precision')} fp16 (and calibrate that bundle), or {_OTHER_WAYS}"


def _less_memory(plan: EnginePlan, workspace: int | None) -> str:  # noqa: ARG001
    return LESS_MEMORY


Advise = Callable[[EnginePlan, "int | None"], str]
"""Returns the advice for a plan that was built with this limit of the workspace in MiB (None: no limit)."""

ADVICE: tuple[tuple[str, Advise], ...] = (
    (r"within workspace limit|allowed workspace", _raise_workspace),
    (r"FP32 GEMM is not supported", _only_fp16),  # TensorRT for RTX on Turing, compute capability 7.5
    (r"HW-specific datatypes", _only_fp16),  # bf16 on Turing
    (r"memory|alloc", _less_memory),
)
"""Pattern of TensorRT's reason -> the advice. The first pattern that is found counts."""


def build_error(plan: EnginePlan, workspace: int | None, messages: Sequence[str]) -> EngineError:
    """Makes the error of a build that returned no engine.

    Args:
        plan: The engine that was to be built.
        workspace: Limit of the builder's scratch memory in MiB; None for no limit.
        messages: TensorRT's warnings and errors; the last one is the reason.
    """
    reason = messages[-1] if messages else "no reason given"
    for pattern, advise in ADVICE:
        if re.search(pattern, reason, re.IGNORECASE):
            fix = advise(plan, workspace)
            break
    else:
        fix = (
            f"export the checkpoint with another {option('precision')}, or run the bundle with {option('backend')} cuda"
        )
    return EngineError(f"TensorRT could not build {plan.path.name} ({reason})", fix)
