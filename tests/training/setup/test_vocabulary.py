"""The miniature's tokenizer: OPT's conventions, one token for each word, any text can be encoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip2edge.training.data.scenes import COLOURS, RELATIONS, SHAPES, SIZES, make_scene
from blip2edge.training.setup.vocabulary import (
    END_ID,
    IMAGE_TOKEN,
    PAD_ID,
    keyword_ids,
    make_tokenizer,
    tokenizer_config,
)

PROMPTS = ("a photo of", "a picture of")


def test_a_caption_is_a_token_a_word_behind_the_end_token() -> None:
    caption = make_scene(0).caption
    ids = make_tokenizer(PROMPTS).encode(caption).ids
    assert ids[0] == END_ID == 2
    assert len(ids) == 1 + len(caption.split())


def test_every_keyword_has_a_token_of_its_own() -> None:
    ids = keyword_ids(make_tokenizer(PROMPTS))
    assert set(ids) == {*SIZES, *COLOURS, *SHAPES, *RELATIONS}
    assert len(set(ids.values())) == len(ids)


def test_any_text_comes_back() -> None:
    tokenizer = make_tokenizer(PROMPTS)
    for text in ("Question: què? 写真 🙂\n", " two  blanks", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_it_is_the_same_each_time_and_ends_with_the_picture_token() -> None:
    one, two = make_tokenizer(PROMPTS), make_tokenizer(PROMPTS)
    assert one.to_str() == two.to_str()
    assert one.token_to_id(IMAGE_TOKEN) == one.get_vocab_size() - 1
    assert one.token_to_id("<pad>") == PAD_ID == 1


def test_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(PROMPTS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(128)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "a photo of", "a small red ring above", "naïve"):
        assert theirs(text).input_ids == tokenizer.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 2, 1)
    assert len(theirs) == tokenizer.get_vocab_size()
