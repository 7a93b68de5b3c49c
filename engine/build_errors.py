"""Makes the error message of a failed build, with advice that depends on TensorRT's message."""

from __future__ import annotations

import re
from collections.abc import Sequence

from blip2edge.engine.prepare import EnginePlan
from blip2edge.errors import EngineError, option
from blip2edge.runtime.backends.engine_files import CONSTANT, IN_PLACE

LESS_MEMORY = (
    f"lower {option('workspace')}, {option('capacity')} or {option('max_batch')}, add swap, or stop other programs on "
    "the board"
)


def build_error(plan: EnginePlan, target: str, workspace: int | None, messages: Sequence[str]) -> EngineError:
    """Returns the error for a build in which TensorRT returned no engine.

    Args:
        plan: The engine that was to be built.
        target: The edition of TensorRT, ``tensorrt`` or ``rtx``.
        workspace: Limit of the builder's scratch memory in MiB; None for no limit.
        messages: TensorRT's warnings and errors; the last message is the reason.
    """
    reason = messages[-1] if messages else "no reason given"
    return EngineError(
        f"TensorRT could not build {plan.path.name} ({reason})", _advice(plan, target, workspace, reason)
    )


def _advice(plan: EnginePlan, target: str, workspace: int | None, reason: str) -> str:
    other = f"run the bundle on that GPU with {option('backend')} cuda"
    if target == "rtx":
        other += f", or build with {option('target')} tensorrt on the machine itself"
    if re.search(r"within workspace limit|allowed workspace", reason):
        if workspace is None:
            return f"lower {option('capacity')} or {option('max_batch')}"
        return f"raise {option('workspace')} above {workspace}, or leave it out"
    if "FP32 GEMM is not supported" in reason:  # TensorRT for RTX on Turing, compute capability 7.5
        if plan.precision == "fp16":
            return f"no {option('precision')} changes this, because parts of this model stay in FP32; {other}"
        return (
            f"export the checkpoint with {option('precision')} fp16 (and calibrate that bundle); a model with a T5 "
            f"keeps parts in FP32 at every precision: {other}"
        )
    if plan.form == IN_PLACE and re.search("Attention|KVCacheUpdate|TensorScatter", reason):
        return f"build with {option('decoder')} {CONSTANT}"
    if re.search(r"out of memory|outofmemory|insufficient memory|not (be )?allocate", reason, re.IGNORECASE):
        return LESS_MEMORY
    return f"export the checkpoint with another {option('precision')}, or {other}"
