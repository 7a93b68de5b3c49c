"""Who sees whom in the Q-Former's self-attention: the three masks of BLIP-2's first stage, in one place.

Slots are the Q queries, then the T tokens of the text (Li et al., arXiv 2301.12597, figure 2):

    itc   unimodal: queries see queries, a text sees its text
    itm   bidirectional: every slot sees every slot
    itg   multimodal causal: queries see queries; a token sees the queries, the tokens before it and itself

Whatever the task, nobody sees padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2edge.model.layers import MASKED

TASKS = ("itc", "itm", "itg")


def attention_mask(task: str, num_queries: int, text_mask: Tensor) -> Tensor:
    """The mask of a task.

    Args:
        task: One of :data:`TASKS`.
        num_queries: Q.
        text_mask: int64 ``[B, T]``, 1 where a token is valid.

    Returns:
        bool ``[B, Q + T, Q + T]``: entry ``[b, i, j]`` says whether slot i sees slot j. What a padded slot sees
        nobody reads.
    """
    rows, length = text_mask.shape
    total = num_queries + length
    is_text = torch.arange(total, device=text_mask.device) >= num_queries  # [Q + T]
    looking, seen = is_text[:, None], is_text[None, :]
    if task == "itc":
        allowed = looking == seen
    elif task == "itm":
        allowed = torch.ones(total, total, dtype=torch.bool, device=text_mask.device)
    elif task == "itg":
        allowed = ~seen | (looking & torch.ones_like(looking & seen).tril())
    else:
        raise ValueError(f"the task {task} is not one of {', '.join(TASKS)}")
    valid = torch.cat([text_mask.new_ones(rows, num_queries), text_mask], dim=1) != 0  # [B, Q + T]
    return allowed[None] & valid[:, None, :]


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: bool ``[B, S, T]`` to ``[B, 1, S, T]``, 0 where a slot is seen."""
    return ((~mask).to(dtype) * MASKED)[:, None]
