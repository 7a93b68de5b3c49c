"""One of several processes that make a step of stage 1 together."""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
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


def take_step(rank: int, directory: Path) -> None:
    """Saves the losses of this rank, and the gradients after all ranks have joined theirs, as ``rank-N.pt``."""
    timeout = timedelta(seconds=120)
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timeout)
    rows = slice(rank * 2, rank * 2 + 2)
    model = draw_stage1()
    prepare_stage1(model)
    joined = DistributedDataParallel(model)
    losses = joined(*part(rows), drawn(rows))
    torch.stack(list(losses.values())).sum().backward()
    values = {name: float(value.detach()) for name, value in losses.items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save((values, gradients), directory / f"rank-{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    status = 1
    try:
        take_step(int(sys.argv[1]), Path(sys.argv[2]))
        status = 0
    except Exception:  # noqa: BLE001 - printed, and the process ends with status 1
        traceback.print_exc()
    finally:
        # Destroying a gloo group may deadlock or abort: a gloo thread frees tensors and waits for the interpreter's
        # lock (pytorch/pytorch#75097, #190489). The process ends without it.
        sys.stderr.flush()
        os._exit(status)
