"""Averages of the trained weights over the steps of a phase (EMA).

    average = d * average + (1 - d) * weights,   d = min(decay, (1 + n) / (10 + n)) after n updates

An exponential moving average (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992) with the warm-up of TensorFlow's
``ExponentialMovingAverage(num_updates=n)``: the first weights count little, however short the phase is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from blip2edge.training.loop.snapshots import Snapshot

FACT = "averaged"  # key of a snapshot's facts: number of updates
_PREFIX = "average."  # begins the names of the averages in a snapshot


class Averages:
    """Keeps the averages of the trained weights of one phase, in float32. Averages of sharded parameters are sharded.

    Args:
        module: The trained module, without the wrapper for several processes. The averages begin at its weights.
        decay: Largest decay d of an update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay, self._updates = decay, 0
        self._trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self._averages = {name: _own(each).float().clone() for name, each in self._trained.items()}

    def update(self) -> None:
        """Updates the averages with the present weights of the module; call it after each step."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        for name, parameter in self._trained.items():
            self._averages[name].lerp_(_own(parameter).float(), 1.0 - decay)

    def exchange(self) -> None:
        """Exchanges the averages and the module's weights; a second call exchanges them back."""
        for name, parameter in self._trained.items():
            kept = _own(parameter).float().clone()
            _own(parameter).copy_(self._averages[name])
            self._averages[name].copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages into the module during a ``with`` block; afterwards puts the module's weights back."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what a snapshot stores: the averages by name, and the number of updates as a JSON value.

        Every process must call this method, because it gathers the shards of all processes.
        """
        tensors = {}
        for name, parameter in self._trained.items():
            average = self._averages[name]
            if isinstance(parameter, DTensor):
                spread: Any = parameter.detach().clone()
                spread.to_local().copy_(average)
                average = spread.full_tensor()
            tensors[f"{_PREFIX}{name}"] = average.cpu().clone()
        return tensors, {FACT: self._updates}

    def restore(self, snapshot: Snapshot) -> None:
        """Restores the averages from a snapshot; if it has no averages, they begin at the module's present weights."""
        self._updates = int(snapshot.facts.get(FACT, 0))
        for name, parameter in self._trained.items():
            kept = snapshot.tensors.get(f"{_PREFIX}{name}")
            if kept is None:
                self._averages[name].copy_(_own(parameter))
            elif isinstance(parameter, DTensor):
                spread = distribute_tensor(kept.to(parameter.device), parameter.device_mesh, parameter.placements)
                self._averages[name].copy_(spread.to_local())
            else:
                self._averages[name].copy_(kept)


def _own(parameter: nn.Parameter) -> Tensor:
    """Returns this process' values of a parameter, without gradient; the tensor shares the parameter's memory."""
    values = parameter.detach()
    return values.to_local() if isinstance(values, DTensor) else values
