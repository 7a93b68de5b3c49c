"""Building blocks that all models share: attention, masks, norms, activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeyValue = tuple[Tensor, Tensor]
Module = TypeVar("Module", bound=nn.Module)

MASKED = -3.0e4
"""Score added where a query must not attend to a key.

It is finite in fp16 (largest value 65504), so that a row with no valid key (padding) stays finite. It is so low that
the attention weight of the key is exactly 0 in fp32: exp(x) underflows below x = -104.
"""


def quick_gelu(x: Tensor) -> Tensor:
    """Computes ``x * sigmoid(1.702 x)``, the approximation of GELU in CLIP (openai/CLIP, model.py)."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Computes the tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def stack(layers: Iterable[Module]) -> Sequence[Module]:
    """Makes a ``ModuleList`` of layers; for type checkers, it is a sequence of the layers' class."""
    return cast("Sequence[Module]", nn.ModuleList(layers))


def entry_points(layer: nn.Module) -> tuple[str, ...]:
    """Returns the names of the methods that run a layer: the class attribute ``entry_points``, else ``forward``.

    The modules inside a layer run only within these methods. So training can wrap the methods, to gather the layer's
    weights from all processes (FSDP) or to run the layer again in the backward pass (activation checkpointing).
    """
    names: tuple[str, ...] = getattr(layer, "entry_points", ("forward",))
    return names


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter and buffer of a module, by name; also works on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


class RMSNorm(nn.Module):
    """Divides vectors by the root of their mean square, times a weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., D]`` over the last axis; computes in float32 if x has 16 bits, as transformers does."""
        wide = x.float() if x.dtype.itemsize == 2 else x  # the square of 256 is infinite in fp16
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight


class Unit(nn.Module):
    """Scales vectors to length 1. It is a module so that an fp16 graph can keep this operation in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """Scales vectors ``[..., F]`` along the last axis."""
        return F.normalize(x, dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshapes ``[B, S, heads * d]`` to ``[B, heads, S, d]``."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Reshapes ``[B, heads, S, d]`` to ``[B, S, heads * d]``."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Computes scaled dot-product attention (Vaswani et al., arXiv 1706.03762, equation 1).

    Args:
        query: Queries ``[B, H, S, d]``; if their batch is 1, all B rows of ``key`` share them.
        key: Keys ``[B, H, T, d]``.
        value: Values ``[B, H, T, d]``.
        bias: Added to the scores, broadcastable to ``[B, H, S, T]``; :data:`MASKED` hides a key.
        scale: Factor on the scores.

    Returns:
        The weighted values, ``[B, H, S, d]``.
    """
    if not torch.compiler.is_exporting():
        query = query.expand(key.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    if scale != 1.0:
        query = query * scale  # the smaller operand: S * d products instead of S * T
    scores = query @ key.transpose(-1, -2)  # [B, H, S, T]
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)
    return weights @ value


class Attention(nn.Module):
    """Multi-head attention. A separate method (:meth:`key_value`) computes keys and values, so that they can be cached.

    Args:
        width: Width of the states that attend, and of the output.
        heads: Number of heads.
        head_dim: Width of a head.
        context_width: Width of the states that are attended to; None for ``width``.
        bias: Whether the four matrices have biases.
        scale: Factor on the scores; None for ``head_dim ** -0.5``.
        norm: Function that makes the norms of each head's queries and keys; None for no norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        context_width: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        norm: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        inner, context_width = heads * head_dim, context_width or width
        self.heads = heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(context_width, inner, bias=bias)
        self.value = nn.Linear(context_width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)
        self.query_norm = norm() if norm else nn.Identity()
        self.key_norm = norm() if norm else nn.Identity()

    def key_value(self, context: Tensor) -> KeyValue:
        """Computes keys and values ``[B, H, T, d]`` from ``context [B, T, C]``."""
        key = self.key_norm(split_heads(self.key(context), self.heads))
        return key, split_heads(self.value(context), self.heads)

    def forward(self, x: Tensor, key_value: KeyValue, bias: Tensor | None = None) -> Tensor:
        """Lets ``x [B, S, D]`` attend to keys and values; ``bias`` is added to the scores ``[B, H, S, T]``.

        Returns ``[B, S, width]``.
        """
        query = self.query_norm(split_heads(self.query(x), self.heads))
        return self.out(merge_heads(attend(query, *key_value, bias, self.scale)))


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int, output: int, activation: str, bias: bool = True) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner, bias=bias)
        self.fc2 = nn.Linear(inner, output, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., width]`` to ``[..., output]``."""
        return self.fc2(self.activation(self.fc1(x)))


class FeedForward(nn.Module):
    """Feed-forward of two matrices, or of three if it is gated (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int, activation: str, gated: bool, bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(width, inner, bias=bias) if gated else None
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, S, D]`` to the same shape."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def append_to_cache(past: KeyValue | None, new: KeyValue) -> KeyValue:
    """Appends new keys and values ``[B, H, S, d]`` to cached ``[B, H, P, d]``; returns ``[B, H, P + S, d]`` each."""
    return new if past is None else (torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2))


def key_mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Makes the bias of attention scores that hides padded keys.

    Args:
        mask: int64 ``[B, T]``, 1 where a key is valid.
        dtype: dtype of the scores.

    Returns:
        The bias ``[B, 1, 1, T]``, to be added to the scores.
    """
    return ((1 - mask).to(dtype) * MASKED)[:, None, None, :]


def causal_bias(mask: Tensor, steps: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Makes the bias of a decoder's attention scores: a slot attends to itself and to the valid slots before it.

    A padded slot attends to itself only. If all its keys were hidden, the attention weights would depend on the
    rounding of scores near :data:`MASKED`, and runtimes would differ in these unused outputs.

    Args:
        mask: int64 ``[B, P + S]``, 1 where a slot is valid.
        steps: S, number of new slots: the last S slots are the queries.
        dtype: dtype of the scores.
        window: How many slots a slot attends to, itself included; None for all.

    Returns:
        The bias ``[B, 1, S, P + S]``, to be added to the scores.
    """
    total = mask.shape[1]
    slots = torch.arange(total, device=mask.device)
    # Not slots[total - steps:]: a slice makes the exporter fix the length.
    queries = torch.arange(steps, device=mask.device) + (total - steps)
    out = slots[None, :] > queries[:, None]  # [S, P + S]
    if window is not None:
        out = out | (slots[None, :] <= queries[:, None] - window)
    padded = (mask == 0)[:, None, :] & (slots[None, :] != queries[:, None])[None]
    hidden = out[None] | padded  # [B, S, P + S]
    return (hidden.to(dtype) * MASKED)[:, None]


def chosen_queries(queries: Tensor, query_ids: Tensor | None) -> Tensor:
    """Selects the learned queries that enter a bridge.

    Args:
        queries: All M learned queries, ``[1, M, D]`` or ``[M, D]``.
        query_ids: The numbers 0 to Q - 1 of the queries to use for a picture, int64 ``[B, Q]`` or ``[1, Q]``; None for
            all queries. The bridge must be trained with varying Q (Matryoshka Query Transformer: Hu et al., arXiv
            2405.19315).

    Returns:
        The selected queries, ``[B, Q, D]`` or ``[1, Q, D]``; ``queries`` itself if ``query_ids`` is None.
    """
    return queries if query_ids is None else F.embedding(query_ids, queries.reshape(-1, queries.shape[-1]))


def gather_positions(x: Tensor, indices: Tensor | None) -> Tensor:
    """Selects K of the S slots of ``x [B, S, D]`` by ``indices``, int64 ``[B, K]``; returns ``[B, K, D]``.

    If ``indices`` is None, all slots are returned.
    """
    if indices is None:
        return x
    return torch.gather(x, 1, indices[:, :, None].expand(-1, -1, x.shape[-1]))
