"""Converts texts to token ids and back with the `tokenizers` package, also incrementally, token by token."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from blip2edge.errors import BundleError, PromptError

_REPLACEMENT = "\ufffd"  # decoders put it in place of bytes that are not valid UTF-8
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
_TRIM_AT = 16  # most tokens that a stream decodes again; older ones, whose text is final, are dropped


class Tokenizer:
    """A `tokenizer.json`, with the results of transformers' `PreTrainedTokenizerFast` for the same file.

    As by default in transformers 5, spaces before punctuation are kept (`clean_up_tokenization_spaces` false).

    Args:
        backend: The tokenizer; truncation and padding that were saved with it are switched off.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        decoder = backend.decoder
        self.byte_fallback = decoder is not None and _has_byte_fallback(json.loads(decoder.__getstate__()))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            BundleError: The file is missing, or is no tokenizer.
        """
        if not Path(path).is_file():
            raise BundleError(f"{os.fspath(path)}: no such file", "export the checkpoint again")
        try:
            backend = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the package raises bare Exception for every fault of the file
            raise BundleError(f"{os.fspath(path)}: not a tokenizer.json ({error})") from error
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included (`len(tokenizer)` in transformers)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def base_vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id, or None if the vocabulary lacks it."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the special tokens of the tokenizer's template.

        Raises:
            PromptError: The text holds half a surrogate pair, which is no character.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise PromptError("expected a text of whole characters, got half a surrogate pair", "send it as UTF-8")
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, as transformers' `batch_decode` gives it; ids without a token are left out."""
        kept = [int(token_id) for token_id in ids if token_id >= 0]
        return self._backend.decode(kept, skip_special_tokens=skip_special_tokens)


def _has_byte_fallback(decoder: dict[str, object]) -> bool:
    parts = decoder.get("decoders", [])
    inner = parts if isinstance(parts, list) else []
    return decoder.get("type") == "ByteFallback" or any(_has_byte_fallback(part) for part in inner)


class TextStream:
    """Converts tokens to text one by one; text that was returned never changes afterwards.

    All pieces of `push` and the last one of `flush` together are `tokenizer.decode(all ids)`. Text that a later token
    could change is returned later: bytes that are not yet a whole UTF-8 character; with byte-fallback tokenizers
    (Llama), a run of byte tokens until another token follows, because one invalid byte turns the whole run into U+FFFD.

    Each push decodes a short window of the latest tokens, not the whole text, so its cost is constant.

    Args:
        tokenizer: Decodes the tokens; special tokens are skipped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the latest tokens, from a character boundary on
        self._taken = 0  # characters of the window's text that were processed already
        self._boundary = 0  # tokens of the window after the last push that processed all of its text

    def push(self, token_id: int) -> str:
        """Adds one token.

        Args:
            token_id: The next generated id; an id without a token adds nothing.

        Returns:
            The text that is final now, often that of the token; "" if no further text is final.
        """
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(int(token_id))
        if self._tokenizer.byte_fallback and _BYTE_TOKEN.match(token):
            return ""
        text = self._decode_window()
        final = text.rstrip(_REPLACEMENT)
        fresh = final[self._taken :]
        self._taken = max(self._taken, len(final))
        if self._taken == len(text):
            self._shorten_window()
        return fresh

    def flush(self) -> str:
        """Ends the text; returns the rest, with incomplete characters as U+FFFD. The stream can be used again."""
        rest = self._decode_window()[self._taken :]
        self._window, self._taken, self._boundary = [], 0, 0
        return rest

    def _decode_window(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def _shorten_window(self) -> None:
        """Shortens a long window; some tokens stay, because decoders treat the first token of a text differently."""
        if len(self._window) >= _TRIM_AT:
            self._window = self._window[self._boundary :]
            self._taken = len(self._decode_window())
        self._boundary = len(self._window)


class StopText:
    """Cuts a growing text before the first stop string; a possible beginning of one is returned later.

    Args:
        stops: The strings; without any, all text is returned at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._over = False

    def push(self, text: str) -> str:
        """Takes more text; returns the part that is certainly before any stop text."""
        if self._over:
            return ""
        held = self._held + text
        ends = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self._over = True
            return held[: min(ends)]
        kept = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def flush(self) -> str:
        """Ends the text; returns the part that was held back."""
        return "" if self._over else self._held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class TextPieces:
    """Converts tokens to pieces of text: whole characters, up to the first stop string.

    Args:
        tokenizer: Decodes the tokens.
        stops: The stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._text, self._stops = TextStream(tokenizer), StopText(stops)

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is final now, possibly empty."""
        return self._stops.push(self._text.push(token))

    def flush(self) -> str:
        """The rest."""
        return self._stops.push(self._text.flush()) + self._stops.flush()
