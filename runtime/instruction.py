"""The instruction on its way into the bridge: tokens of the Q-Former's own tokenizer, a row a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blip2edge.contract import INSTRUCTION
from blip2edge.errors import PromptError
from blip2edge.runtime.session import Array
from blip2edge.runtime.tokenizer import Tokenizer


class Instructor:
    """Tokenises the instructions of a batch.

    Args:
        tokenizer: The Q-Former's.
        longest: Positions that the Q-Former has.
        frames: Pictures an item; each is read with the item's instruction.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int, frames: int) -> None:
        self.tokenizer = tokenizer
        self.longest = longest
        self.frames = frames

    def __call__(self, texts: Sequence[str | None]) -> dict[str, Array]:
        """The bridge's inputs beside the picture.

        Args:
            texts: B instructions.

        Returns:
            ``instruction_ids`` and ``instruction_mask`` int64 ``[B * frames, T]``, padded on the right: an
            instruction's tokens have the positions that they have alone.

        Raises:
            PromptError: There is none for a picture, or it is longer than the Q-Former's table of positions.
        """
        rows = [self._tokens(text) for text in texts]
        ids = np.zeros((len(rows), max(1, *map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        arrays = (ids.repeat(self.frames, axis=0), mask.repeat(self.frames, axis=0))
        return dict(zip(INSTRUCTION, arrays, strict=True))

    def _tokens(self, text: str | None) -> list[int]:
        if text is None:
            raise PromptError(
                "this model looks at a picture with an instruction in mind, and there is none",
                "give a --prompt",
            )
        tokens = self.tokenizer.encode(text)
        if len(tokens) > self.longest:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but the Q-Former reads at most {self.longest}",
                "shorten the prompt",
            )
        return tokens
