"""Spreads a phase's parameters over its processes (FSDP), layer by layer.

Zhao et al., arXiv 2304.11277, by torch's ``fully_shard``: each process holds a part of each parameter, of its gradient
and of its optimizer state. A layer's parameters are gathered before the layer runs, forward and backward, and released
after it. So a process holds its share of the model, one whole layer, and what belongs to no layer (token table, head,
norms). Frozen parameters are spread too.

``fully_shard`` acts before and after a module's ``forward``. Layers that are also run by other methods name them
(:func:`~blip2edge.model.layers.entry_points`), and these are registered here.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from blip2edge.errors import ConfigError
from blip2edge.model.layers import entry_points
from blip2edge.training.loop.optim import LAYER_LISTS, transformer_layers

_LISTS = (*LAYER_LISTS, "feed_forwards")  # the latter: of the text head, whose layers are those of the Q-Former

_SHARDING_LAUNCHES = (
    ("FSDP", "ACCELERATE_USE_FSDP", "use_fsdp"),
    ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", "use_deepspeed"),
    ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM", "use_megatron_lm"),
    ("accelerate's parallelism config", "ACCELERATE_USE_PARALLELISM_CONFIG", "use_parallelism_config"),
)
"""What `accelerate launch` can divide a model with: name, the environment variable that it sets, and its option."""


def check_launcher() -> None:
    """Checks that `accelerate launch` only starts the processes; call it before the ``Accelerator`` is made.

    The loop does not support models that the launcher divides: its first process reads parameters alone, and would
    wait forever for the others' parts.

    Raises:
        ConfigError: The launcher was told to use FSDP, DeepSpeed, Megatron-LM or its parallelism config.
    """
    for name, variable, flag in _SHARDING_LAUNCHES:
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"accelerate's launcher divides the model with {name} ({variable}=true)",
                f"leave --{flag} out, and its section in accelerate's config file; [loop] fsdp = true in the recipe"
                " shards the parameters over the processes",
            )


def check_sharding(accelerator: Accelerator) -> None:
    """Checks that this run can spread its parameters.

    Raises:
        ConfigError: There is only one process.
    """
    if accelerator.num_processes == 1:
        raise ConfigError(
            "[loop] fsdp is true, but there is only one process",
            "start several: torchrun --nproc-per-node N -m blip2edge train …; or set fsdp to false",
        )


@dataclass
class Sharding:
    """The modules of a phase whose parameters are spread, and how they were before.

    Attributes:
        modules: The outermost modules.
        before: Class and attributes of each module in them, before it was spread. The values are those of the
            attributes that are restored: hooks and entry points; None for the others.
        scalars: Parameters without dimensions, which cannot be spread: each process has them all. They are in the order
            of ``parameters()``, because all processes must average their gradients in the same order.
    """

    modules: tuple[nn.Module, ...]
    before: list[tuple[nn.Module, type, dict[str, Any]]] = field(default_factory=list)
    scalars: list[nn.Parameter] = field(default_factory=list)

    def sync_scalars(self) -> None:
        """Averages the gradients of the parameters that are not spread; call it after the backward pass."""
        for parameter in self.scalars:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def undo(self) -> None:
        """Gathers all parameters on every process, and makes the modules those that they were before."""
        for module in self.modules:
            for each in module.modules():
                if isinstance(each, FSDPModule):
                    each.reshard()
            gather_sharded(module)
        for module, kind, attributes in self.before:
            module.__class__ = kind
            # torch has no public way back, and a later phase may shard the same module again.
            _composable_state._module_state_mapping.pop(module, None)
            for name in list(vars(module)):
                if name not in attributes:  # the state of fully_shard, and the methods that it has wrapped
                    del vars(module)[name]
                elif _is_hooks(name) or name in entry_points(module):
                    vars(module)[name] = attributes[name]


def shard(accelerator: Accelerator, modules: Iterable[nn.Module]) -> Sharding:
    """Spreads the parameters of modules over all processes, each layer on its own.

    Args:
        accelerator: The accelerator of this process. Every process must call this function.
        modules: Modules that share no parameter; changed in place.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sharding = Sharding(tuple(modules))
    for root in sharding.modules:
        for each in root.modules():
            sharding.before.append((each, type(each), _attributes(each)))
        scalars = [each for each in root.parameters() if each.ndim == 0]
        for scalar in scalars:
            scalar.data = scalar.data.to(accelerator.device)
        sharding.scalars += scalars
        for unit in (*transformer_layers(root, _LISTS), root):
            fully_shard(unit, mesh=mesh, ignored_params=set(scalars))
            for name in entry_points(unit):
                if name != "forward":
                    register_fsdp_forward_method(unit, name)
    return sharding


@contextmanager
def views_allowed() -> Iterator[None]:
    """Within this context, sharded layers may return views without a warning of torch.

    torch warns because a view that is changed in place loses its gradient; no layer changes its input in place.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
        yield


def gather_sharded(module: nn.Module) -> None:
    """Replaces sharded parameters by whole ones, on every process; a tied parameter stays one."""
    gathered: dict[int, nn.Parameter] = {}
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in gathered:
                gathered[id(parameter)] = nn.Parameter(whole_tensor(parameter.detach()), parameter.requires_grad)
            setattr(owner, name, gathered[id(parameter)])


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole of a sharded tensor, on every process; another tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(module: nn.Module, largest: float) -> float:
    """Clips the gradients of spread parameters to a norm; returns their norm, the same on every process.

    Args:
        module: The module after the backward pass.
        largest: Largest norm over all gradients.
    """
    trained = [each for each in module.parameters() if each.grad is not None]
    spread = [each for each in trained if isinstance(each.grad, DTensor)]
    kinds = [kind for kind in (spread, [each for each in trained if not isinstance(each.grad, DTensor)]) if kind]
    norms = [get_total_norm([each.grad for each in kind if each.grad is not None]) for kind in kinds]
    norm = math.sqrt(sum(float(whole_tensor(each)) ** 2 for each in norms))
    for kind in kinds:
        clip_grads_with_norm_(kind, largest, torch.tensor(norm))
    return norm


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module itself, with the values that :meth:`Sharding.undo` restores, else None."""
    found: dict[str, Any] = dict.fromkeys(vars(module))
    for name, value in vars(module).items():
        if _is_hooks(name):
            found[name] = value.copy()
        elif name in entry_points(module):  # recompute_activations has wrapped it
            found[name] = value
    return found


def _is_hooks(name: str) -> bool:
    """Whether an attribute of a module holds functions that torch calls."""
    return "_hooks" in name
