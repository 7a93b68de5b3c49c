"""Keys of a tokenizer's files that have no effect are named, and no other key is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the tokenizers are saved by transformers")

import transformers

from blip2edge.model.checkpoint.tokenizer import read_tokenizer
from tests.families import drawing_blip, drawing_idefics, drawing_instruct, drawing_llama

BYTES: dict[str, int] = {letter: at for at, letter in enumerate(["<|startoftext|>", "<|endoftext|>", "a", "b", "ab"])}
MERGES: Any = [("a", "b")]
WORDS = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.0)]
LLAMA = {piece: at for at, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a"])}

MAKERS: dict[str, Callable[[], Any]] = {
    "BLIP": drawing_blip.bert_tokenizer,
    "Idefics": drawing_idefics.draw_tokenizer,
    "InstructBLIP, T5": lambda: drawing_instruct.tokenizer("t5", "<image>"),
    "InstructBLIP, video": lambda: drawing_instruct.tokenizer("llama", "<video>"),
    "Q-Former": drawing_instruct.qformer_tokenizer,
    "LLaVA": drawing_llama.tokenizer,
    "Bert": lambda: transformers.BertTokenizer(vocab=WORDS),
    "GPT2": lambda: transformers.GPT2Tokenizer(vocab=BYTES, merges=MERGES),
    "CLIP": lambda: transformers.CLIPTokenizer(vocab=BYTES, merges=MERGES),
    "Qwen2": lambda: transformers.Qwen2Tokenizer(vocab=BYTES, merges=MERGES),
    "T5": lambda: transformers.T5Tokenizer(vocab=PIECES, extra_ids=2),
    "Llama": lambda: transformers.LlamaTokenizer(vocab=LLAMA, merges=[("▁", "a")]),
}


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize("kind", MAKERS)
def test_what_transformers_saves_gives_no_warning(kind: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[kind]()
    tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).warnings == ()
    # and the files that transformers 4 wrote beside them
    tokens = {token.content: at for at, token in tokenizer.added_tokens_decoder.items()}
    edit(tmp_path / "added_tokens.json", **tokens)
    edit(tmp_path / "special_tokens_map.json", **tokenizer.special_tokens_map)
    edit(tmp_path / "tokenizer_config.json", sp_model_kwargs={}, legacy=False, never_split=[], device_map=None)
    assert read_tokenizer(tmp_path).warnings == ()
    edit(tmp_path / "tokenizer_config.json", favourite=3)
    (warning,) = read_tokenizer(tmp_path).warnings
    assert warning == (
        f"{tmp_path / 'tokenizer_config.json'}: not used, as transformers does not read it either: favourite"
    )


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("tokenizer_config.json", {"favourite": 3, "colour": "red", "shape": None}, "favourite, colour"),
        ("tokenizer_config.json", {"do_lower_case": True, "strip_accents": True}, "do_lower_case, strip_accents"),
        ("tokenizer_config.json", {"add_eos_token": True, "add_bos_token": True}, "add_eos_token"),
        ("special_tokens_map.json", {"favourite": [1], "eos_token": "</s>"}, "favourite"),
        ("added_tokens.json", {"a dog": 7, "<image>": drawing_llama.IMAGE_ID}, "a dog"),
    ],
)
def test_a_key_without_effect_is_named(file: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    drawing_llama.tokenizer().save_pretrained(tmp_path)
    edit(tmp_path / file, **changes)
    (warning,) = read_tokenizer(tmp_path).warnings
    assert warning == f"{tmp_path / file}: not used, as transformers does not read it either: {named}"


def test_files_that_transformers_skips_are_named_where_they_differ(tmp_path: Path) -> None:
    """``added_tokens_decoder`` in ``tokenizer_config.json`` replaces the two other files."""
    tokenizer = drawing_llama.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    decoder = {str(at): token.__getstate__() for at, token in tokenizer.added_tokens_decoder.items()}
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder)
    edit(tmp_path / "special_tokens_map.json", eos_token={"content": "</s>"}, unk_token="a", padding_side="left")
    edit(tmp_path / "added_tokens.json", **{"<image>": 3})
    assert [warning.rpartition(": ")[2] for warning in read_tokenizer(tmp_path).warnings] == [
        "unk_token, padding_side",
        "<image>",
    ]
