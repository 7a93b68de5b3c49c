"""What several processes compute, seen by each of them; with one process, or no process group, nothing happens.

LAVIS gathers contrastive features without gradient, so that a rank's pictures learn nothing from the texts of the
others. Here the gradient flows back, and N processes at batch B take the same step as one process at N * B.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """This process' number and how many there are: 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """Concatenation along dimension 0 over all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """``[B, ...]`` to ``[N * B, ...]``."""
        rank, size = rank_and_size()
        ctx.own = slice(rank * len(tensor), (rank + 1) * len(tensor))
        parts = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Every rank's loss reads this rank's part: the gradients add up."""
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.own]


def gather(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks, with gradient.

    Args:
        tensor: ``[B, ...]``; B and the other lengths are the same on every rank.

    Returns:
        ``[N * B, ...]``.
    """
    if rank_and_size()[1] == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
    return gathered


def gather_padded(tensor: Tensor, value: int) -> Tensor:
    """The same for texts: int64 ``[B, T]``, where T differs from rank to rank and the end is filled with ``value``."""
    if rank_and_size()[1] == 1:
        return tensor
    longest = torch.tensor(tensor.shape[1], device=tensor.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padded = tensor.new_full((len(tensor), int(longest)), value)
    padded[:, : tensor.shape[1]] = tensor
    return gather(padded)


def mean_over_ranks(count: Tensor) -> Tensor:
    """A count, averaged over the ranks, without gradient; a scalar.

    A loss that every rank divides by it has, averaged over the ranks, the gradient of one over all rows together.
    """
    size = rank_and_size()[1]
    if size == 1:
        return count.detach()
    total = count.detach().to(torch.float32).clone()
    dist.all_reduce(total)
    return total / size
