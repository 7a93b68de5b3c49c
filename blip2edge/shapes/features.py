"""Reads which embeddings of a vision encoder the model uses: of which block, and with or without the class token.

Two keys of ``config.json`` say this, as in transformers' LLaVA:

- ``vision_feature_layer``: -1 for the output of the last block without the final norm, -2 for the block before it,
  and so on. If the key is missing, the output of the encoder after the final norm is used (``last_hidden_state``).
- ``vision_feature_select_strategy``: with ``full``, all embeddings are used. With ``default``, the embeddings before
  the patches (class token, registers) are left out.
"""

from __future__ import annotations

from typing import Any

from blip2edge.errors import CheckpointError, UnsupportedModelError

LAYER, STRATEGY = "vision_feature_layer", "vision_feature_select_strategy"
FULL, PATCHES = STRATEGIES = ("full", "default")


def is_full(strategy: Any, section: str = "") -> bool:
    """Whether a value of ``vision_feature_select_strategy`` is ``full``.

    Args:
        strategy: The value.
        section: Name of the section that has the key, for errors; empty for none.

    Raises:
        CheckpointError: The value is neither ``full`` nor ``default``.
    """
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        place = f"{section}.{STRATEGY}" if section else STRATEGY
        raise CheckpointError(f"config.json: {place} must be default or full, not {strategy!r:.60}")
    return strategy == FULL


def feature_blocks(layer: Any, depth: int) -> int:
    """Returns the number of blocks that run before the features are taken.

    In transformers, layer 0 is the input of the first block.

    Args:
        layer: The value of ``vision_feature_layer``: a number, or a list of one.
        depth: Number of blocks of the encoder.

    Raises:
        CheckpointError: The number is outside 1 to ``depth`` and -``depth`` to -1.
        UnsupportedModelError: There are several numbers.
    """
    if isinstance(layer, (list, tuple)) and len(layer) != 1:
        raise UnsupportedModelError(
            f"the features of {len(layer)} vision layers are joined, which is not supported",
            f"supported: one {LAYER}",
        )
    one = layer[0] if isinstance(layer, (list, tuple)) and len(layer) == 1 else layer
    count = one + depth + 1 if isinstance(one, int) and one < 0 else one
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= depth:
        raise CheckpointError(
            f"config.json: {LAYER} must be from 1 to {depth}, or from -{depth} to -1 (counted from the last layer), "
            f"not {layer!r:.60}"
        )
    return count
