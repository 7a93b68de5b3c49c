"""Tokenizes texts for the Q-Former's text side; adds BERT's special tokens and [DEC] to any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken

from blip2edge.bundle.schema import DRAFT_TOKENIZER_FILE
from blip2edge.errors import UsageError
from blip2edge.model.config import DraftConfig
from blip2edge.training.loading.batches import TextBatch, pad_with_mask

CLS, SEP, PAD, DEC = "[CLS]", "[SEP]", "[PAD]", "[DEC]"
MAX_LENGTH = 32
"""Length of the longest text in tokens, special tokens included; the value of the BLIP-2 paper."""


class QFormerTexts:
    """Makes batches of texts for the Q-Former.

    The text side needs four special tokens. If the tokenizer lacks some of them, these are added at the end of its
    vocabulary: to BERT's tokenizer, only [DEC] is added. If the tokenizer is that of the language
    model, both the draft model and the language model use its token ids, and no conversion is needed.

    Args:
        tokenizer: Any tokenizer; it is copied, not changed.
        max_length: Longest text in tokens, special tokens included.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_length: int = MAX_LENGTH) -> None:
        if max_length < 3:
            raise UsageError(f"expected max_length to be at least 3 tokens, got {max_length}")
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
            raise UsageError(
                f"the token {token} cannot be added to the Q-Former's tokenizer", "use another tokenizer.json"
            )
        return int(token_id)

    def draft_config(self, max_positions: int | None = None) -> DraftConfig:
        """Makes the config of the text head: vocabulary, special tokens and positions (``max_length`` by default)."""
        return DraftConfig(
            vocab_size=self.tokenizer.get_vocab_size(with_added_tokens=True),
            max_positions=max_positions or self.max_length,
            dec_token_id=self._dec,
            end_token_id=self._sep,
            pad_token_id=self._pad,
        )

    def __call__(self, captions: Sequence[str], pictures: Sequence[int] | None = None) -> TextBatch:
        """Makes a batch of texts, padded to the longest text. Texts over ``max_length`` tokens are cut before [SEP].

        Args:
            captions: B texts.
            pictures: Number of each text's picture, if a picture can come twice in a batch.
        """
        room = self.max_length - 2
        encoded = self.tokenizer.encode_batch(list(captions), add_special_tokens=False)
        rows = [[self._cls, *encoding.ids[:room], self._sep] for encoding in encoded]
        numbers = None if pictures is None else torch.tensor(list(pictures))
        return TextBatch(*pad_with_mask(rows, self._pad), numbers)

    def save(self, directory: Path) -> None:
        """Writes ``draft_tokenizer.json``, the file with the draft model's tokenizer, into a directory."""
        self.tokenizer.save(str(directory / DRAFT_TOKENIZER_FILE))
