"""Token merging: in every layer of a ViT, between attention and MLP, the most similar patches are merged.

Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3 and appendix D. The patches are
assigned to two sets alternately. Each patch of the first set is paired with the patch of the second whose key (mean
over the heads) is most similar by cosine. The ``r`` most similar pairs become their mean, weighted by how many patches
each represents.
In later layers a key that represents ``s`` patches counts ``s`` times: ``log s`` is added to its score (proportional
attention, equation 1). The class token is never merged.

``r`` is the same for every picture, so that every shape is known when a graph is made. Pairs are added by multiplying
with a matrix of zeros and ones, because not every TensorRT supports scatter with a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def merged_counts(patches: int, layers: int, tokens: int) -> list[int]:
    """Computes how many patches each layer merges away: ``tokens``, but at most half of the remaining patches.

    Args:
        patches: Number of patches before the first layer, without the class token.
        layers: Number of layers of the ViT.
        tokens: r, number of patches to merge in each layer.
    """
    counts: list[int] = []
    for _ in range(layers):
        counts.append(min(tokens, patches // 2))
        patches -= counts[-1]
    return counts


def most_merged(patches: int, layers: int) -> int:
    """Returns the largest number of patches per layer that can be merged so that at least one patch remains.

    The limit that a layer merges at most half of its patches is not applied here.
    """
    return (patches - 1) // layers


class Pairs(NamedTuple):
    """The pairs of patches that a layer merges; its n = A + C patches are divided into two sets, A and C.

    Attributes:
        order: int64 ``[B, A]``, indices in set A: the patches that stay in their order, then the merged patches.
        weights: ``[B, C, r]``, share of each merged patch in the patch of set C that it is merged into.
        kept: ``[B, C, 1]``, share of the patch of set C itself; this share and the row of ``weights`` add up to 1.
        sizes: ``[B, n - r]``, how many patches each slot represents after the merge.
        bias: ``[B, 1, 1, 1 + n - r]``, bias of the next layer's scores; 0 for the class token.
    """

    order: Tensor
    weights: Tensor
    kept: Tensor
    sizes: Tensor
    bias: Tensor


class TokenMatching(nn.Module):
    """Bipartite soft matching, without weights. It is a module so that an fp16 graph can keep this part in fp32."""

    def forward(self, keys: Tensor, sizes: Tensor, count: int) -> Pairs:
        """Chooses the pairs of patches that a layer merges.

        Args:
            keys: Keys of the layer's attention, ``[B, H, 1 + n, d]``, the class token first.
            sizes: ``[B, n]``, number of patches that each slot represents.
            count: r, number of patches to merge away.
        """
        unit = F.normalize(keys.mean(dim=1)[:, 1:], dim=-1)  # [B, n, d]
        scores = unit[:, 1::2] @ unit[:, ::2].transpose(-1, -2)  # [B, A, C]
        ranked, partner = self.choose(scores)
        split = ranked.shape[1] - count
        merged = ranked[:, :count]
        staying = ranked[:, count:].topk(split, largest=False).values if split else ranked[:, count:]
        slots = torch.arange(scores.shape[2], device=keys.device)
        chosen = torch.gather(partner, 1, merged)  # [B, r]
        pairs = (chosen[:, None, :] == slots[None, :, None]).to(sizes.dtype)  # [B, C, r]
        order = torch.cat([staying, merged], dim=1)
        first, second = torch.gather(sizes[:, 1::2], 1, order), sizes[:, ::2]
        shares = pairs * first[:, None, split:]  # [B, C, r]
        total = second + shares.sum(dim=-1)
        weights, kept = shares / total[:, :, None], (second / total)[:, :, None]
        sizes = torch.cat([first[:, :split], total], dim=1)
        bias = torch.cat([torch.zeros_like(sizes[:, :1]), sizes.log()], dim=1)
        return Pairs(order, weights, kept, sizes, bias[:, None, None, :])

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the best partner in set C for each patch of set A, and sorts set A by these scores.

        Args:
            scores: Similarity of each patch of set A with each patch of set C, ``[B, A, C]``.

        Returns:
            Indices of set A, best score first, and the partner's index for each patch of set A in its original order;
            int64 ``[B, A]`` each.
        """
        best, partner = scores.max(dim=-1)
        return best.topk(best.shape[1]).indices, partner


def merge(x: Tensor, pairs: Pairs) -> Tensor:
    """Merges the pairs in ``x [B, 1 + n, D]``, the class token first; returns ``[B, 1 + n - r, D]``."""
    split = pairs.order.shape[1] - pairs.weights.shape[2]
    patches = x[:, 1:]
    first, second = patches[:, 1::2], patches[:, ::2]
    first = torch.gather(first, 1, pairs.order[:, :, None].expand(-1, -1, x.shape[-1]))
    merged = second * pairs.kept.to(x.dtype) + pairs.weights.to(x.dtype) @ first[:, split:]
    return torch.cat([x[:, :1], first[:, :split], merged], dim=1)
