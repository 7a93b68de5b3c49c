"""Texts for the first stage: any tokenizer with BERT's special tokens and [DEC]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken

from blip2edge.bundle.schema import DRAFT_TOKENIZER_FILE
from blip2edge.errors import UsageError
from blip2edge.model.bridges.draft import DraftConfig
from blip2edge.training.loading.batches import TextBatch

CLS, SEP, PAD, DEC = "[CLS]", "[SEP]", "[PAD]", "[DEC]"
MAX_LENGTH = 32
"""Tokens of a text, the special ones included; the paper's."""


class QFormerTexts:
    """Turns captions into what the first stage reads.

    A caption's draft can be taken over token by token where the language model has the same words: give its
    tokenizer here, and the four special tokens are added behind its vocabulary. BERT's own gets [DEC] alone.

    Args:
        tokenizer: Any; a copy is changed.
        max_length: Longest text in tokens, the special ones included.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_length: int = MAX_LENGTH) -> None:
        if max_length < 3:
            raise UsageError(f"expected texts of at least 3 tokens, got max_length {max_length}")
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        missing = [token for token in (CLS, SEP, PAD, DEC) if self.tokenizer.token_to_id(token) is None]
        self.tokenizer.add_special_tokens([AddedToken(token, special=True) for token in missing])
        self.max_length = max_length
        self._cls, self._sep, self._pad, self._dec = (self._id(token) for token in (CLS, SEP, PAD, DEC))

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UsageError(f"the tokenizer takes no token {token}")
        return int(token_id)

    def draft_config(self, max_positions: int | None = None) -> DraftConfig:
        """The special tokens; ``max_positions`` is the length of the position table, ``max_length`` if left out."""
        return DraftConfig(
            vocab_size=self.tokenizer.get_vocab_size(with_added_tokens=True),
            max_positions=max_positions or self.max_length,
            dec_token_id=self._dec,
            end_token_id=self._sep,
            pad_token_id=self._pad,
        )

    def __call__(self, captions: Sequence[str], pictures: Sequence[int] | None = None) -> TextBatch:
        """A batch, as long as its longest text; what exceeds ``max_length`` is cut off before [SEP].

        Args:
            captions: B texts.
            pictures: The number of each one's picture, where a picture can be twice in a batch.
        """
        room = self.max_length - 2
        encoded = self.tokenizer.encode_batch(list(captions), add_special_tokens=False)
        rows = [[self._cls, *encoding.ids[:room], self._sep] for encoding in encoded]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return TextBatch(ids, mask, None if pictures is None else torch.tensor(list(pictures)))

    def save(self, directory: Path) -> None:
        """Writes ``draft_tokenizer.json`` beside a draft."""
        self.tokenizer.save(str(directory / DRAFT_TOKENIZER_FILE))
