"""The words of a text with their log-probabilities, and how a terminal shows them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from blip2edge.cli.caption import shown_text
from blip2edge.runtime.decoding.generated import Word, words_of

PIECES = ("a", " red", " d", "og", "\n", " runs", "##", "# Human", "</s>")
END = len(PIECES) - 1
LOGPROBS = (-0.1, -2.0, -0.2, -1.5, -0.1, -0.3, -0.4, -5.0, -0.1)


class StubTokenizer:
    """A token is its place in PIECES."""

    special_ids = frozenset((END,))
    byte_fallback = False
    clean_up = False

    def id_to_token(self, token: int) -> str:
        return PIECES[token]

    def decode_raw(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(PIECES[one] for one in ids if one != END or not skip_special_tokens)


def words(text: str) -> tuple[Word, ...]:
    return words_of(StubTokenizer(), range(len(PIECES)), LOGPROBS, text)  # type: ignore[arg-type]


def test_words_end_where_the_text_ends() -> None:
    """The text is cut at the stop string, and the tokens are not."""
    dog = [Word("a", -0.1), Word("red", -2.0), Word("dog", -1.5)]
    assert list(words("a red dog\n runs")) == [*dog, Word("runs", -0.3)]
    assert list(words("a red dog\n runs#")) == [*dog, Word("runs#", -0.4)]  # a part of a token
    assert list(words("a red do")) == [*dog[:2], Word("do", -1.5)]
    assert words("") == ()  # of a caption that abstained


def test_a_terminal_shows_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its line break, without its stop string, and with marks around the unsure words."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    result: Any = SimpleNamespace(text="a red dog\n runs", finish_reason="stop")
    captioner: Any = SimpleNamespace(words=lambda one: words(one.text))
    assert shown_text(captioner, result) == "a \x1b[4mred\x1b[24m \x1b[4mdog\x1b[24m\n runs"
