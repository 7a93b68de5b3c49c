"""Saves and restores the state of a phase: trained weights, optimiser moments and random generators, as named tensors.

`torch.distributed.checkpoint` gathers these tensors from all processes. So the same code works for one process, for DDP
and for sharded parameters. A run with one process needs no process group.
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
from blip2edge.training.loop.sharding import gather_sharded
from blip2edge.training.loop.snapshots import Snapshot

_WEIGHTS, _MOMENTS, _CHANCE = "weights.", "moments.", "chance."
_SCALE = "scale"  # loss scaling under float16
_SCALE_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_OWN = StateDictOptions(ignore_frozen_params=True)  # the shard of this process
_LOOSE = StateDictOptions(full_state_dict=True, strict=False)  # frozen parameters are missing


def capture(accelerator: Accelerator, module: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Copies the training state, so that a resumed run makes the same next step; the data's position is not included.

    Args:
        accelerator: The accelerator of this process. Every process must call this function.
        module: The module from `accelerator.prepare`.
        optimizer: The optimiser from `accelerator.prepare`.

    Returns:
        CPU tensors by name: trained weights, optimiser moments, and the random generators of each process. If the
        parameters are sharded, only the first process gets weights and moments; the others get the generators.
    """
    weights: Any = get_model_state_dict(module, options=_WHOLE)
    moments: Any = get_optimizer_state_dict(module, optimizer.optimizer, options=_WHOLE).get("state", {})
    tensors = {f"{_WEIGHTS}{name}": _copy(tensor) for name, tensor in weights.items()}
    for name, values in moments.items():
        tensors |= {f"{_MOMENTS}{name}/{key}": _copy(torch.as_tensor(value)) for key, value in values.items()}
    for rank, chance in enumerate(gather_object([_generators(accelerator)])):
        tensors |= {f"{_CHANCE}{rank}.{name}": state for name, state in chance.items()}
    if accelerator.scaler is not None:
        scale = accelerator.scaler.state_dict()
        tensors[_SCALE] = torch.tensor([float(scale[key]) for key in _SCALE_KEYS], dtype=torch.float64)
    return tensors


def restore(accelerator: Accelerator, module: nn.Module, optimizer: Any, snapshot: Snapshot) -> None:
    """Restores the training state that `capture` returned.

    Args:
        accelerator: The accelerator of this process. Every process must call this function with the same snapshot.
        module: The module from `accelerator.prepare`.
        optimizer: The optimiser from `accelerator.prepare`, before its first step.
        snapshot: A snapshot with the tensors from `capture`.

    Raises:
        DataError: The snapshot was written by another number of processes, or other parameters are trained.
    """
    if snapshot.facts["processes"] != accelerator.num_processes:
        raise DataError(
            f"the run was started with {snapshot.facts['processes']} processes,"
            f" but now there are {accelerator.num_processes}",
            f"use the same number of processes, or start again with {option('force', on=True)}",
        )
    weights = _under(_WEIGHTS, snapshot.tensors)
    trained = get_model_state_dict(module, options=_OWN)
    if trained.keys() != weights.keys():
        raise DataError(
            "the snapshot belongs to a recipe that trains other parts of the model",
            f"resume with the recipe of the snapshot, or start again with {option('force', on=True)}",
        )
    set_model_state_dict(module, dict(weights), options=_LOOSE)
    moments: dict[str, Any] = get_optimizer_state_dict(module, optimizer.optimizer, options=_OWN)
    for path, tensor in _under(_MOMENTS, snapshot.tensors).items():
        name, _, key = path.rpartition("/")
        moments["state"][name][key] = _spread_like(moments["state"][name][key], tensor)
    set_optimizer_state_dict(module, optimizer.optimizer, moments, options=_OWN)
    own = _under(f"{_CHANCE}{accelerator.process_index}.", snapshot.tensors)
    torch.set_rng_state(own["cpu"])
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], accelerator.device)
    if accelerator.scaler is not None and _SCALE in snapshot.tensors:
        values = dict(zip(_SCALE_KEYS, snapshot.tensors[_SCALE].tolist(), strict=True))
        integers = {key: int(values[key]) for key in ("growth_interval", "_growth_tracker")}
        accelerator.scaler.load_state_dict(values | integers)


def gather_parameters(accelerator: Accelerator, module: nn.Module, plain: nn.Module) -> None:
    """Removes the wrappers of accelerate and gathers sharded parameters in `plain` on every process.

    Args:
        accelerator: The accelerator of this process. Every process must call this function.
        module: The module from `accelerator.prepare`.
        plain: The original module, before `accelerator.prepare`; changed in place.
    """
    accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    plain.zero_grad(set_to_none=True)
    gather_sharded(plain)


def _generators(accelerator: Accelerator) -> dict[str, Tensor]:
    """Returns the states of this process' random generators, as tensors by name."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return states


def _spread_like(present: Any, tensor: Tensor) -> Tensor:
    """Returns this process' shard of `tensor` if `present` is a sharded tensor, else `tensor` itself."""
    if isinstance(present, DTensor):
        return distribute_tensor(tensor.to(present.device), present.device_mesh, present.placements)
    return tensor


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`; the prefix is removed from the names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
