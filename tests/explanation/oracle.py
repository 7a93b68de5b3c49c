"""The attention weights of a bridge, computed in torch apart from the graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from blip2edge.model.checkpoint.directory import load_model


def torch_attention(
    directory: Path, pixels: NDArray[np.float32], queries: int, *inputs: Tensor, **named: Tensor
) -> tuple[list[NDArray[np.float64]], NDArray[np.float32]]:
    """Softmax of the scores of every attention of Q queries to at least P keys, and the visual tokens.

    Args:
        directory: The checkpoint.
        pixels: ``[1, 3, H, W]``.
        queries: Q.
        *inputs: Inputs of the bridge besides the picture's embeddings.
        **named: The same by name.
    """
    model: Any = load_model(directory).eval()
    found: list[Tensor] = []
    plain = F.scaled_dot_product_attention

    def recorded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None) -> Tensor:
        scores = query.double() @ key.double().transpose(-1, -2) * scale
        found.append((scores if attn_mask is None else scores + attn_mask).softmax(dim=-1))
        return plain(query, key, value, attn_mask=attn_mask, scale=scale)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        embeds = model.vision(torch.from_numpy(pixels))
        patch.setattr(F, "scaled_dot_product_attention", recorded)
        tokens = (
            model.bridge(embeds, *inputs, **named) if hasattr(model, "bridge") else model.matcher.image_features(embeds)
        )
    wide = [one for one in found if one.shape[-1] >= embeds.shape[1] and one.shape[-2] == queries]
    return [one.numpy() for one in wide], tokens.numpy()
