"""The three self-attention masks of the Q-Former in BLIP-2's first stage.

Slots are the Q queries, then the T tokens of the text (Li et al., arXiv 2301.12597, figure 2):

    itc   unimodal: queries attend to queries, the tokens of a text attend to each other
    itm   bidirectional: every slot attends to every slot
    itg   multimodal causal: queries attend to queries; a token attends to the queries, to itself and to earlier tokens

No slot attends to padding, in any task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2edge.model.layers import MASKED

TASKS = ("itc", "itm", "itg")


def attention_mask(task: str, num_queries: int, text_mask: Tensor) -> Tensor:
    """Makes the Q-Former's attention mask for a training task: which queries and tokens attend to each other.

    Args:
        task: Name of the task, one of :data:`TASKS`.
        num_queries: Q, number of query tokens.
        text_mask: int64 ``[B, T]``, 1 where a token is valid.

    Returns:
        bool ``[B, Q + T, Q + T]``: entry ``[b, i, j]`` is true if slot i attends to slot j. Rows of
        padded slots have no meaning.
    """
    rows, length = text_mask.shape
    total = num_queries + length
    is_text = torch.arange(total, device=text_mask.device) >= num_queries  # [Q + T]
    query, key = is_text[:, None], is_text[None, :]
    if task == "itc":
        allowed = query == key
    elif task == "itm":
        allowed = torch.ones(total, total, dtype=torch.bool, device=text_mask.device)
    elif task == "itg":
        allowed = ~key | (query & torch.ones_like(query & key).tril())
    else:
        raise ValueError(f"the task {task} is not one of {', '.join(TASKS)}")
    valid = torch.cat([text_mask.new_ones(rows, num_queries), text_mask], dim=1) != 0  # [B, Q + T]
    return allowed[None] & valid[:, None, :]


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a mask, bool ``[B, S, T]``, to a bias of the scores ``[B, 1, S, T]``, 0 where the mask is true."""
    return ((~mask).to(dtype) * MASKED)[:, None]
