"""Converts texts to token ids and back with the `tokenizers` package; also converts generated tokens one by one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from blip2edge.bundle.prompt_spec import INTERLEAVED, MARKERS, VIDEO_MARKER, PromptSpec
from blip2edge.errors import Blip2EdgeError, BundleError, PromptError
from blip2edge.reading import read_bytes, reading

_REPLACEMENT = "\ufffd"  # what decoders put where bytes are no valid UTF-8
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
# The end of a text that a later character could still change under _CLEAN_UP: spaces and apostrophes, then
# perhaps the first letter of n't, 've or 're.
_UNSETTLED = re.compile(r"[ ']+[nvr]?[ ']*\Z")
_TRIM_AT = 16  # most tokens that a stream decodes again; older ones, whose text is final, are dropped


CHARACTERS_PER_TOKEN = 32
"""A text is refused if it has more characters than this number times the context's tokens; usual texts have 4 to 5."""


def check_characters_fit(texts: Iterable[str], max_positions: int, field: str = "prompt") -> None:
    """Checks the length of texts before tokenization, because tokenizing a million characters takes about 1 s.

    Args:
        texts: The parts of a prompt, which are counted together.
        max_positions: Length of the context in tokens.
        field: Name of the option that has the text, for the error.

    Raises:
        PromptError: The texts have more than :data:`CHARACTERS_PER_TOKEN` characters for each position.
    """
    most = CHARACTERS_PER_TOKEN * max_positions
    count = sum(map(len, texts))
    if count > most:
        raise PromptError(
            f"the {field} has {count} characters, but the model takes at most {max_positions} tokens",
            f"shorten the {field}",
            field=field,
        )


TOKENIZER_BYTES = 256 << 20
"""Largest size of a `tokenizer.json` in bytes; a file with 256,000 tokens has 35 MB."""


def parse_tokenizer(
    content: bytes, path: str | Path, error: type[Blip2EdgeError], fix: str | None
) -> tokenizers.Tokenizer:
    """Parses a `tokenizer.json`.

    Args:
        content: The file's bytes.
        path: Path of the file, for the error.
        error: Class of the error.
        fix: What the user can do about a broken file.

    Raises:
        Blip2EdgeError: An error of the class ``error``: the content is no tokenizer.
    """
    with reading(path, "a tokenizer.json", error, fix):
        parsed = tokenizers.Tokenizer.from_str(content.decode())
        if parsed.get_vocab_size(with_added_tokens=True) < 1:
            raise ValueError("the vocabulary has no token")
    return parsed


class Tokenizer:
    """A tokenizer from a `tokenizer.json`; it gives the same ids and texts as transformers' `PreTrainedTokenizerFast`.

    Args:
        backend: The tokenizer; truncation and padding that were saved with it are switched off.
        clean_up_tokenization_spaces: The setting of that name in `tokenizer_config.json` (default in transformers 5:
            false). As in transformers, the setting has no effect on BPE models.
        split_special_tokens: The setting of that name: whether special tokens in a text are tokenized like other text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        self._backend = backend
        self.clean_up = clean_up_tokenization_spaces and type(backend.model).__name__ != "BPE"
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_tokens = tuple(sorted(token.content for token in added.values() if token.special))
        decoder = backend.decoder
        self.byte_fallback = decoder is not None and _has_byte_fallback(json.loads(decoder.__getstate__()))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **flags: bool) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Args:
            path: The `tokenizer.json` file.
            **flags: Keyword arguments of the class: `clean_up_tokenization_spaces`, `split_special_tokens`.

        Raises:
            BundleError: The file is missing, or is not a tokenizer.
        """
        fix = "copy the bundle again, or export the checkpoint again"
        with reading(os.fspath(path), "a tokenizer.json", BundleError, fix):
            content = read_bytes(Path(path), TOKENIZER_BYTES)
        return cls(parse_tokenizer(content, os.fspath(path), BundleError, fix), **flags)

    @property
    def vocab_size(self) -> int:
        """Returns the number of tokens, added tokens included (`len(tokenizer)` in transformers)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def base_vocab_size(self) -> int:
        """Returns the number of tokens without the added tokens."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token; None if the vocabulary does not contain the token."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Returns the token of an id; None if the vocabulary does not contain the id."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Converts a text to token ids, by default with the special tokens of the tokenizer's template.

        Raises:
            PromptError: The text contains half a surrogate pair, or characters that the vocabulary does not cover.
        """
        _check_characters(text)
        with reading("the text", "tokens of this model", PromptError, "change the text, or export the model again"):
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def check_plain(self, text: str, reserved: Sequence[str], field: str = "prompt") -> None:
        """Checks that a text contains no reserved text, before and after the tokenizer's normalization.

        Args:
            text: What a user typed.
            reserved: :attr:`special_tokens`, or :func:`reserved_texts`.
            field: Name of the option that has the text, for the error.

        Raises:
            PromptError: The text contains a reserved text, or half a surrogate pair.
        """
        _check_characters(text)
        normalizer = self._backend.normalizer
        forms = (text, text if normalizer is None else normalizer.normalize_str(text))
        for token in reserved:
            if any(token in form for form in forms):
                what = "marks a picture" if token in (MARKERS[1], VIDEO_MARKER) else "is a special token of this model"
                raise PromptError(
                    f"the {field} contains {token}, which {what}", f"remove it from the {field}", field=field
                )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Converts token ids to text, as transformers' `batch_decode`; ids without a token are ignored."""
        text = self.decode_raw(ids, skip_special_tokens)
        return clean_up_spaces(text) if self.clean_up else text

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Converts token ids to text, without the clean-up of spaces; raises BundleError if the decoder is broken."""
        kept = [int(token_id) for token_id in ids if token_id >= 0]
        try:
            return self._backend.decode(kept, skip_special_tokens=skip_special_tokens)
        except BaseException:
            with reading("the tokens", "a text", BundleError, "export the checkpoint again"):
                raise


def reserved_texts(spec: PromptSpec, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the texts that a user's prompt must not contain: special tokens, and the markers of pictures.

    Such texts would end the text or mark the place of a picture, which only the template may do. Exception: interleaved
    prompts may contain the marker of a picture and the end of a document.
    """
    declared: set[str | None] = set()
    video = VIDEO_MARKER if spec.frames > 1 else ""
    if spec.kind == INTERLEAVED:
        end = None if spec.end_token_id is None else tokenizer.id_to_token(spec.end_token_id)
        declared = {MARKERS[1], spec.picture_token, end}
    slot = None if spec.image_token_id is None else tokenizer.id_to_token(spec.image_token_id)
    reserved = {*tokenizer.special_tokens, MARKERS[1], video, spec.image_token, slot} - declared
    return tuple(sorted(text for text in reserved if text))


def _check_characters(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError("expected a text of whole characters, got half a surrogate pair", "send it as UTF-8")


def _has_byte_fallback(decoder: dict[str, object]) -> bool:
    parts = decoder.get("decoders", [])
    inner = parts if isinstance(parts, list) else []
    return decoder.get("type") == "ByteFallback" or any(_has_byte_fallback(part) for part in inner)


def clean_up_spaces(text: str) -> str:
    """Removes spaces before punctuation and English contractions (`clean_up_tokenization` of transformers)."""
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text


class TextStream:
    """Converts generated tokens to text one by one; text that was returned never changes afterwards.

    The results of all `push` calls and of `flush`, joined, equal `tokenizer.decode(all ids)`. Text is returned only
    when no later token can change it. Three kinds of text must wait: bytes that are not yet a whole UTF-8 character;
    several byte tokens in a row (in tokenizers with byte fallback, such as Llama's), because one invalid byte turns all
    of them into U+FFFD; and, with the clean-up of spaces, an ending that the next character could change.

    Each `push` decodes only the latest tokens (the window), never the whole text, so its time is constant.

    Args:
        tokenizer: Decodes the tokens.
        skip_special_tokens: As in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []  # the latest tokens, from a character boundary on
        self._taken = 0  # characters of the window's text that are already taken
        self._boundary = 0  # tokens of the window at the last push after which everything was taken
        self._unsettled = ""  # taken, but the clean-up of spaces may still change it

    def push(self, token_id: int) -> str:
        """Adds the next token.

        Args:
            token_id: The next generated id; an id without a token adds nothing.

        Returns:
            The text that has become final, often the text of this token; "" if no text has become final.
        """
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        self._window.append(int(token_id))
        if self._tokenizer.byte_fallback and _BYTE_TOKEN.match(token):
            return ""
        text = self._decode_window()
        settled = text.rstrip(_REPLACEMENT)
        fresh = settled[self._taken :]
        self._taken = max(self._taken, len(settled))
        if self._taken == len(text):
            self._let_go()
        return self._settle(fresh)

    def flush(self) -> str:
        """Ends the text; returns the text that was waiting, with U+FFFD for incomplete characters.

        Afterwards, a new text can begin.
        """
        rest = self._decode_window()[self._taken :]
        final = self._clean(self._unsettled + rest)
        self._window, self._taken, self._boundary, self._unsettled = [], 0, 0, ""
        return final

    def _decode_window(self) -> str:
        return self._tokenizer.decode_raw(self._window, skip_special_tokens=False)

    def _let_go(self) -> None:
        """Removes old tokens from the list of tokens that are decoded together, if the list is long.

        The last tokens stay in the list, because decoders treat the first token differently from later tokens.
        """
        if len(self._window) >= _TRIM_AT:
            self._window = self._window[self._boundary :]
            self._taken = len(self._decode_window())
        self._boundary = len(self._window)

    def _settle(self, fresh: str) -> str:
        if not self._tokenizer.clean_up:
            return fresh
        text = self._unsettled + fresh
        tail = _UNSETTLED.search(text)
        cut = tail.start() if tail else len(text)
        self._unsettled = text[cut:]
        return self._clean(text[:cut])

    def _clean(self, text: str) -> str:
        return clean_up_spaces(text) if self._tokenizer.clean_up else text


class StopText:
    """Cuts a growing text before the first stop string; text that may be the start of a stop string must wait.

    Args:
        stops: The stop strings; if empty, all text is returned at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._over = False

    def push(self, text: str) -> str:
        """Adds text; returns the text that can be returned now: it is certainly before any stop string."""
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
        """Ends the text; returns the text that was waiting."""
        return "" if self._over else self._held


def _overlap(text: str, stop: str) -> int:
    """Returns how many of the last characters of `text` are the beginning of `stop`; the largest such number."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class TextPieces:
    """Converts generated tokens to pieces of the text that the user gets.

    A piece has whole characters only, and the text ends before the first stop string. Spaces before the first and after
    the last word are dropped. The pieces joined are the text that is made from all tokens at once.

    Args:
        tokenizer: Decodes the tokens.
        stops: The stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._text, self._stops = TextStream(tokenizer), StopText(stops)
        self._begun = False
        self._spaces = ""  # after the last word

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is final now, which may be empty."""
        return self._stripped(self._stops.push(self._text.push(token)))

    def flush(self) -> str:
        """Ends the text; returns the text that was waiting."""
        return self._stripped(self._stops.push(self._text.flush()) + self._stops.flush())

    def _stripped(self, text: str) -> str:
        whole = self._spaces + text if self._begun else text.lstrip()
        kept = whole.rstrip()
        self._spaces = whole[len(kept) :]
        self._begun = self._begun or bool(kept)
        return kept
