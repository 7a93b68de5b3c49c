"""One of several processes that make a step of stage 1 together."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from blip2edge.training.loading.batches import TextBatch
from blip2edge.training.phases.stage1 import prepare_stage1
from tests.training.drawing_stage1 import draw_batch, draw_stage1

PICTURES = [5, 9, 5, 2]
DRAWS = [[1, 3, 1, 0], [3, 2, 1, 2]]  # columns of pictures, then of texts, over all rows
RANKS = 2


def drawn(rows: slice) -> Any:
    """The rows' share of :data:`DRAWS`."""
    columns = iter(DRAWS)
    return lambda weights: torch.tensor(next(columns)[rows])


def part(rows: slice) -> tuple[Tensor, TextBatch]:
    """Some rows of the batch, no longer than their longest text."""
    images, texts = draw_batch(4, pictures=PICTURES)
    longest = int(texts.attention_mask[rows].sum(dim=1).max())
    assert texts.pictures is not None
    mask = texts.attention_mask[rows, :longest]
    return images[rows], TextBatch(texts.input_ids[rows, :longest], mask, texts.pictures[rows])


def gradients(rank: int, store: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses of this rank, and the gradients after all ranks have joined theirs."""
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timeout)
    try:
        rows = slice(rank * 2, rank * 2 + 2)
        model = draw_stage1()
        prepare_stage1(model)
        joined = DistributedDataParallel(model)
        losses = joined(*part(rows), drawn(rows))
        torch.stack(list(losses.values())).sum().backward()
        values = {name: float(value.detach()) for name, value in losses.items()}
        return values, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    gradients(int(sys.argv[1]), sys.argv[2])
