"""Results of generation: a text's tokens and words with their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from blip2edge.runtime.text.tokenizer import TextStream, Tokenizer

Likeliest = tuple[tuple[int, float], ...]
"""The likeliest tokens at one position of a text, each with its log-probability, likeliest first."""


@dataclass(frozen=True)
class Generated:
    """The generated text of one row.

    Attributes:
        tokens: The ids that the decoder was started with, then the generated ids; with the end token, without padding.
        finish_reason: Why the text ended: "eos" (end token), "length" (limit) or "stop" (stop string).
        score: The length-penalised log-probability of the best beam; None without beam search.
        tokens_per_pass: Number of generated tokens divided by the decoder's passes for them; 1 without a draft model.
        token_logprobs: Log-probability (natural logarithm) that the model gives each generated token: the log-softmax
            of the decoder's logits, before logits processors and temperature.
        likeliest: For each generated token, the likeliest tokens at its position; empty without
            ``GenerationOptions.top_logprobs``.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    score: float | None
    tokens_per_pass: float = 1.0
    # Not compared: their last digits depend on the batch, as those of the logits do.
    token_logprobs: tuple[float, ...] = field(default=(), compare=False)
    likeliest: tuple[Likeliest, ...] = field(default=(), compare=False)

    @property
    def logprob(self) -> float:
        """Returns the log-probability of the text: the sum over its tokens."""
        return math.fsum(self.token_logprobs)


@dataclass(frozen=True)
class Word:
    """A word of a text, and the lowest log-probability of its tokens."""

    text: str
    logprob: float


@dataclass(frozen=True)
class TextToken:
    """A token: its characters, its log-probability, and the likeliest tokens at its position with log-probabilities."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...] = ()


class TextPiece(str):
    """A piece of a streamed text: a str that also has tokens.

    Attributes:
        tokens: The tokens whose last character is in this piece.
    """

    __slots__ = ("tokens",)

    tokens: tuple[TextToken, ...]

    def __new__(cls, text: str, tokens: Sequence[TextToken]) -> TextPiece:  # noqa: PYI034 - typing.Self is of Python 3.11
        """Makes a piece from its text and the tokens that end in this text."""
        piece = super().__new__(cls, text)
        piece.tokens = tuple(tokens)
        return piece


class TextTokens:
    """Finds the tokens of each piece of a streamed text (the pieces are made by ``text.tokenizer.TextPieces``).

    A token belongs to the piece with the token's last character. The texts of all returned tokens, joined, are the
    streamed text. Tokens after the end of the text, such as the end token, are left out.

    Args:
        tokenizer: Decodes the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, TextStream(tokenizer)
        self._texts: list[str] = []  # of the tokens that are not published yet
        self._read = 0  # tokens whose text is known
        self._room = 0  # characters that are published, without those of published tokens
        self._begun = False

    def take(
        self, ids: Sequence[int], logprobs: Sequence[float], likeliest: Sequence[Likeliest], piece: str
    ) -> list[TextToken]:
        """Adds a piece of the text; returns the tokens that end in this piece.

        Args:
            ids: All token ids so far. The text of the last ids may not be in a piece yet.
            logprobs: The log-probability of each token.
            likeliest: The likeliest tokens at the position of each token; may be empty.
            piece: The next piece.
        """
        self._read_tokens(ids)
        self._room += len(piece)
        return self._completed(ids, logprobs, likeliest)

    def rest(
        self, ids: Sequence[int], logprobs: Sequence[float], likeliest: Sequence[Likeliest], piece: str = ""
    ) -> list[TextToken]:
        """Adds the last piece of the text, as :meth:`take` does; the last token is cut where the text ends."""
        self._read_tokens(ids)
        if self._texts:
            self._texts[-1] += self._stream.flush()
        self._room += len(piece)
        found = self._completed(ids, logprobs, likeliest)
        if self._texts and self._room:
            found.append(self._token(ids, logprobs, likeliest, self._texts[0][: self._room]))
        return found

    def _read_tokens(self, ids: Sequence[int]) -> None:
        for token in ids[self._read :]:
            text = self._stream.push(token)
            self._texts.append(text if self._begun else text.lstrip())
            self._begun = self._begun or bool(self._texts[-1])
            self._read += 1

    def _completed(
        self, ids: Sequence[int], logprobs: Sequence[float], likeliest: Sequence[Likeliest]
    ) -> list[TextToken]:
        """Returns the tokens whose characters are all in the pieces so far, and that were not returned yet."""
        found = []
        while self._texts and 0 < self._room >= len(self._texts[0]):
            found.append(self._token(ids, logprobs, likeliest, self._texts[0]))
        return found

    def _token(
        self, ids: Sequence[int], logprobs: Sequence[float], likeliest: Sequence[Likeliest], text: str
    ) -> TextToken:
        """Returns the first token that was not returned yet, and counts it as returned."""
        at = self._read - len(self._texts)
        self._texts.pop(0)
        self._room -= len(text)
        others = likeliest[at] if at < len(likeliest) else ()
        before = [ids[at - 1]] if at else []
        return TextToken(text, logprobs[at], tuple((self._alone(before, other), value) for other, value in others))

    def _alone(self, before: list[int], token: int) -> str:
        """Returns the characters that a token adds after the tokens ``before``; also for special tokens."""
        start = self._tokenizer.decode_raw(before, skip_special_tokens=False)
        return self._tokenizer.decode_raw([*before, token], skip_special_tokens=False)[len(start) :]


def words_of(tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[float], text: str) -> tuple[Word, ...]:
    """Returns the words of a text, which are separated by white space; see :class:`Word`.

    Args:
        tokenizer: Decodes the tokens.
        tokens: The generated ids.
        logprobs: The log-probability of each generated id.
        text: The text that the user got. Tokens after the end of this text, such as a stop string's, are left out.
    """
    found: list[Word] = []
    begins = True
    for token in TextTokens(tokenizer).rest(tokens, logprobs, (), text):
        for at, part in enumerate(token.text.split()):
            if at or begins or token.text[0].isspace():
                found.append(Word(part, token.logprob))
            else:
                found[-1] = Word(found[-1].text + part, min(found[-1].logprob, token.logprob))
        begins = token.text[-1].isspace() if token.text else begins
    return tuple(found)
