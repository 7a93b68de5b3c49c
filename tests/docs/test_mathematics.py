"""The pictures and figures of docs/mathematics.md."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mathematics.md"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("mathematics_pictures")


def test_the_pictures_are_those_of_the_script_and_on_the_page(pictures: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, draw in pictures.PICTURES.items():
        assert (pictures.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == draw(), "run: make docs"
        assert f"](mathematics/{name}.svg)" in page
    assert len(list(pictures.FOLDER.iterdir())) == len(pictures.PICTURES)


def test_the_figures_in_the_text() -> None:
    text = PAGE.read_text(encoding="utf-8")
    vocabulary, smoothing = 30_523, 0.1
    right, other = 1 - smoothing + smoothing / vocabulary, smoothing / vocabulary
    least = -(right * math.log(right) + (vocabulary - 1) * other * math.log(other))
    assert f"cannot fall below {least:.2f}" in " ".join(text.split())
    assert f"ln N: {math.log(16):.2f} at 16, {math.log(64):.2f} at 64" in text
    shares = -(math.log(1 / 3) / 3 + math.log(2 / 3) * 2 / 3)
    assert f"has the loss {shares:.2f}" in text
    assert f"({math.log(50_272):.1f} for OPT's 50,272 tokens)" in text
    product = re.search(r"OPT-2.7b in fp16:  ([\d· ]+) = ([\d,]+) bytes", text)
    assert product is not None
    assert math.prod(map(int, product[1].split(" · "))) == int(product[2].replace(",", ""))


def test_expected_tokens_are_those_of_drawn_acceptances(pictures: Any) -> None:
    # All patterns of acceptance of k tokens, each with its probability.
    rate, proposed = 0.7, 4
    expected = 0.0
    for pattern in range(2**proposed):
        accepted = [bool(pattern >> at & 1) for at in range(proposed)]
        run = accepted.index(False) if False in accepted else proposed
        expected += (run + 1) * math.prod(rate if yes else 1 - rate for yes in accepted)
    assert pictures.tokens_per_pass(rate, proposed) == pytest.approx(expected)
