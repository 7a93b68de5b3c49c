"""Spreads a phase's parameters over its processes (FSDP), layer by layer.

The method is that of Zhao et al., arXiv 2304.11277, by torch's ``fully_shard``. Each process holds a part of each
parameter, with the same part of the gradient and of the optimizer state. The parameters of a layer are gathered before
the layer's forward or backward pass, and released after it. So a process holds its share of the model, one whole layer,
and the parameters that belong to no layer (token embedding table, head, norms). Frozen parameters are spread too.

``fully_shard`` adds its work before and after a module's ``forward``. Some layers are also run by other methods. The
names of these methods come from :func:`~blip2edge.model.layers.entry_points`, and :func:`shard` registers them.
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
"""Methods by which `accelerate launch` can divide a model.

Each row has the method's name, the environment variable that the launcher sets, and the launcher's option.
"""


def check_launcher() -> None:
    """Checks that `accelerate launch` only starts the processes; call it before the ``Accelerator`` is made.

    The training loop does not support models that the launcher divides. The loop reads parameters in the first process
    only, and that process would wait forever for the shards of the other processes.

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
    """Checks that the run has several processes, over which its parameters can be spread.

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
    """The modules of a phase whose parameters are spread, and what is needed to undo the spreading.

    Attributes:
        modules: The outermost modules.
        before: (module, class, attributes) for each module and submodule, before its parameters were spread. Values of
            attributes are kept only for the attributes that :meth:`undo` restores (hooks, entry points), else None.
        scalars: Parameters without dimensions, which cannot be spread: each process has all of them. They are in the
            order of ``parameters()``, because all processes must average their gradients in the same order.
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
        """Gathers all parameters on every process, and restores the classes and attributes of the modules."""
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
def usable_outside_forward(module: nn.Module) -> Iterator[None]:
    """Gathers, during a ``with`` block, the parameters of a spread module that belong to no layer.

    ``fully_shard`` gathers them when the module's own ``forward`` runs. To generate captions, other methods run, which
    call the submodules one by one. The parameters of a layer are gathered when the layer runs, as always. Every process
    must enter the block.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


@contextmanager
def views_allowed() -> Iterator[None]:
    """Suppresses, during a ``with`` block, torch's warning that a sharded layer returns a view.

    torch warns because a view that is changed in place loses its gradient. Here no layer changes its input in place.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
        yield


def gather_sharded(module: nn.Module) -> None:
    """Replaces sharded parameters by whole parameters, on every process; tied parameters stay tied."""
    gathered: dict[int, nn.Parameter] = {}
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in gathered:
                gathered[id(parameter)] = nn.Parameter(whole_tensor(parameter.detach()), parameter.requires_grad)
            setattr(owner, name, gathered[id(parameter)])


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole tensor for a sharded tensor, on every process; returns any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(module: nn.Module, largest: float) -> float:
    """Clips the gradients of spread parameters to a norm.

    Returns the norm of the gradients before they are clipped; every process gets the same value.

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
    """Returns a module's own attributes by name.

    The value is None for attributes that :meth:`Sharding.undo` does not restore.
    """
    found: dict[str, Any] = dict.fromkeys(vars(module))
    for name, value in vars(module).items():
        if _is_hooks(name):
            found[name] = value.copy()
        elif name in entry_points(module):  # recompute_activations has wrapped it
            found[name] = value
    return found


def _is_hooks(name: str) -> bool:
    """Returns whether a module's attribute with this name holds hooks: functions that torch calls."""
    return "_hooks" in name
