"""Collective operations for losses over several processes. With one process they return their input.

LAVIS gathers contrastive features without gradient, so the pictures of one rank get no gradient from the texts of other
ranks. Here the gradient flows back, and N processes at batch B make the same step as one process at N * B.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """During a ``with`` block, makes the functions of this module act as if this process were the only process."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def rank_and_size() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes: 0 and 1 without a process group."""
    if not _ALONE.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """An autograd function that concatenates tensors of all ranks along dimension 0, with gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Concatenates the tensors ``[B, ...]`` of N ranks; returns ``[N * B, ...]``."""
        rank, size = rank_and_size()
        ctx.own = slice(rank * len(tensor), (rank + 1) * len(tensor))
        parts = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Returns the gradient for this rank's rows: the sum of the gradients from all ranks."""
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.own]


def gather(tensor: Tensor) -> Tensor:
    """Concatenates the rows of all ranks, in the order of the ranks; gradients flow back to this rank's rows.

    Args:
        tensor: ``[B, ...]``; the same shape on every rank.

    Returns:
        ``[N * B, ...]`` for N ranks.
    """
    if rank_and_size()[1] == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
    return gathered


def gather_padded(tensor: Tensor, value: int) -> Tensor:
    """Concatenates the rows int64 ``[B, T]`` of all ranks, where T may differ; rows are padded with ``value``."""
    if rank_and_size()[1] == 1:
        return tensor
    longest = torch.tensor(tensor.shape[1], device=tensor.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padded = tensor.new_full((len(tensor), int(longest)), value)
    padded[:, : tensor.shape[1]] = tensor
    return gather(padded)


def mean_over_ranks(count: Tensor) -> Tensor:
    """Computes the mean of a count over the ranks, as a scalar without gradient.

    If every rank divides its summed loss by this mean, the average over the ranks is the mean loss over all rows.
    """
    size = rank_and_size()[1]
    if size == 1:
        return count.detach()
    total = count.detach().to(torch.float32).clone()
    dist.all_reduce(total)
    return total / size
