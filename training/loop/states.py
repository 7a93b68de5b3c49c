"""What a phase is in the middle of: weights, the optimiser's moments and the generators of chance, by name.

`torch.distributed.checkpoint` gathers them, so that the same code serves one process, DDP and sharded parameters;
it needs no process group where there is one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from blip2edge.errors import DataError, option
from blip2edge.training.loop.snapshots import Snapshot

WEIGHTS, MOMENTS, CHANCE = "weights.", "moments.", "chance."
SCALE = "scale"  # of the loss, under float16
SCALE_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_OWN = StateDictOptions(ignore_frozen_params=True)  # this process' part
_LOOSE = StateDictOptions(full_state_dict=True, strict=False)  # the frozen parts are not in it


def capture(accelerator: Accelerator, module: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Everything that the next step depends on, except the data.

    Args:
        accelerator: Every process calls this; the first one gets the whole.
        module: As `accelerator.prepare` gave it.
        optimizer: Likewise.

    Returns:
        Tensors on the CPU: trained weights, moments, and each process' generators. Where parameters are spread
        over the processes, the others get the generators alone.
    """
    weights: Any = get_model_state_dict(module, options=_WHOLE)
    moments: Any = get_optimizer_state_dict(module, optimizer.optimizer, options=_WHOLE).get("state", {})
    tensors = {f"{WEIGHTS}{name}": _copy(tensor) for name, tensor in weights.items()}
    for name, values in moments.items():
        tensors |= {f"{MOMENTS}{name}/{key}": _copy(torch.as_tensor(value)) for key, value in values.items()}
    for rank, chance in enumerate(gather_object([_generators(accelerator)])):
        tensors |= {f"{CHANCE}{rank}.{name}": state for name, state in chance.items()}
    if accelerator.scaler is not None:
        scale = accelerator.scaler.state_dict()
        tensors[SCALE] = torch.tensor([float(scale[key]) for key in SCALE_KEYS], dtype=torch.float64)
    return tensors


def restore(accelerator: Accelerator, module: nn.Module, optimizer: Any, snapshot: Snapshot) -> None:
    """Takes the place of `capture`.

    Args:
        accelerator: Every process calls this with the same snapshot.
        module: As `accelerator.prepare` gave it.
        optimizer: Likewise, before its first step.
        snapshot: What `capture` gave is among its tensors.

    Raises:
        DataError: It was written by another number of processes, or of other parts.
    """
    if snapshot.facts["processes"] != accelerator.num_processes:
        raise DataError(
            f"the run was begun with {snapshot.facts['processes']} processes,"
            f" and these are {accelerator.num_processes}",
            f"start as many, or start again with {option('force', on=True)}",
        )
    weights = _under(WEIGHTS, snapshot.tensors)
    trained = get_model_state_dict(module, options=_OWN)
    if trained.keys() != weights.keys():
        raise DataError(
            "the snapshot belongs to a recipe that trains other parts",
            f"start again with {option('force', on=True)}",
        )
    set_model_state_dict(module, dict(weights), options=_LOOSE)
    moments: dict[str, Any] = get_optimizer_state_dict(module, optimizer.optimizer, options=_OWN)
    for path, tensor in _under(MOMENTS, snapshot.tensors).items():
        name, _, key = path.rpartition("/")
        moments["state"][name][key] = _spread_like(moments["state"][name][key], tensor)
    set_optimizer_state_dict(module, optimizer.optimizer, moments, options=_OWN)
    own = _under(f"{CHANCE}{accelerator.process_index}.", snapshot.tensors)
    torch.set_rng_state(own["cpu"])
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], accelerator.device)
    if accelerator.scaler is not None and SCALE in snapshot.tensors:
        values = dict(zip(SCALE_KEYS, snapshot.tensors[SCALE].tolist(), strict=True))
        whole = {key: int(values[key]) for key in ("growth_interval", "_growth_tracker")}
        accelerator.scaler.load_state_dict(values | whole)


def collect(accelerator: Accelerator, module: nn.Module, plain: nn.Module) -> None:
    """Takes the wrappers off, so that `plain` and what it shares parameters with are whole on every process."""
    accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    plain.zero_grad(set_to_none=True)
    gathered: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for owner in list(plain.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in gathered:
                gathered[id(parameter)] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
            setattr(owner, name, gathered[id(parameter)])


def _generators(accelerator: Accelerator) -> dict[str, Tensor]:
    """The states of this process' generators."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return states


def _spread_like(present: Any, tensor: Tensor) -> Tensor:
    """This process' part of a whole tensor, where the present one is spread over the processes."""
    if isinstance(present, DTensor):
        return distribute_tensor(tensor.to(present.device), present.device_mesh, present.placements)
    return tensor


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
