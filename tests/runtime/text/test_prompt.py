"""Typed special tokens: one rule for every kind of prompt. No model is loaded."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the tokenizers of test_tokenizer.py are compared with transformers")

from blip2edge.bundle.prompt_spec import INTERLEAVED, PLACEHOLDER, PromptSpec
from blip2edge.errors import PromptError
from blip2edge.runtime.text.prompt import Dialog, InstructionTokenizer, PromptBuilder
from blip2edge.runtime.text.tokenizer import TextPieces, Tokenizer
from tests.runtime.text.test_tokenizer import byte_level, llama, unigram, wordpiece

BYTES, LLAMA, T5, BERT = (Tokenizer(make()) for make in (byte_level, llama, unigram, wordpiece))
IMAGE_ID = BYTES.token_to_id("<image>")
TURNS = {
    "head": "",
    "picture": "USER: {image}{prompt}</s>",
    "user": "USER: {prompt}</s>",
    "assistant": "{prompt}</s>",
    "start": ":",
}
BUILDERS = {
    "BLIP-2": PromptBuilder(PromptSpec("{image}{prompt}", "", 3, 2, IMAGE_ID), BYTES, 300, 400),
    "BLIP-2 without <image>": PromptBuilder(PromptSpec("{image}{prompt}", "", 3, 1), LLAMA, 300, 400),
    "LLaVA": PromptBuilder(
        PromptSpec("USER: {image}{prompt} :", "", 3, 2, IMAGE_ID, image_token="<image>", kind=PLACEHOLDER, turns=TURNS),
        BYTES,
        300,
        400,
    ),
    "video": PromptBuilder(PromptSpec("{image}{prompt}", "", 12, 2, IMAGE_ID, frames=4), BYTES, 300, 400),
    "T5": PromptBuilder(PromptSpec("{image}{prompt}", "", 3, None), T5, 300, 400),
    "BLIP": PromptBuilder(PromptSpec("{prompt}", "", 0, 2, framed=False), BERT, 300, 400),
    "Idefics": PromptBuilder(
        PromptSpec(
            "{image}{prompt}",
            "",
            0,
            2,
            picture_token="<image>",
            around_picture="DOG",
            end_token_id=2,
            kind=INTERLEAVED,
        ),
        BYTES,
        300,
        400,
    ),
}
TYPED = {
    "BLIP-2": ("<image>", "</s>", "<pad>", "<s>"),
    "BLIP-2 without <image>": ("<image>", "</s>", "<s>"),
    "LLaVA": ("<image>", "</s>", "<pad>"),
    "video": ("<video>", "<image>", "</s>", "<pad>"),
    "T5": ("<image>", "</s>", "<pad>", "＜/s＞"),  # the tokenizer reads the last one, full-width, as </s>
    "BLIP": ("<image>", "[SEP]", "[CLS]", "[PAD]"),
    "Idefics": ("<pad>", "<s>"),
}


@pytest.mark.parametrize("family", BUILDERS)
def test_a_typed_special_token_is_refused(family: str) -> None:
    builder = BUILDERS[family]
    for token in TYPED[family]:
        for text in (f"two {token} cats", token, f"two{token}"):
            with pytest.raises(PromptError, match=r"the prompt contains .*; remove it from the prompt") as caught:
                builder(text)
            assert caught.value.field == "prompt"


@pytest.mark.parametrize("family", BUILDERS)
def test_what_only_resembles_one_is_text(family: str) -> None:
    builder = BUILDERS[family]
    for text in (
        "two {prompt} cats",
        "1 < 2 > 0",
        "<imag>",
        "[sep]",
        "< /s>",
        "</ s>",
        "DOG",
        "a\n<b>",
        "<video",
        "video>",
    ):
        ids = builder(text).ids
        special = builder.tokenizer.special_ids - {builder.tokenizer.token_to_id(unk) for unk in ("<unk>", "[UNK]")}
        plain = builder("").ids if family != "BLIP" else builder(None).ids
        assert [token for token in ids if token in special] == [token for token in plain if token in special]


def test_a_video_marker_is_text_for_models_of_pictures() -> None:
    for family in set(BUILDERS) - {"video"}:
        assert BUILDERS[family]("a <video> of").ids
    with pytest.raises(PromptError, match="the prompt contains <video>, which marks a picture; remove it"):
        BUILDERS["video"]("a <video> of")
    with pytest.raises(PromptError, match="the prompt contains <image>, which marks a picture; remove it"):
        BUILDERS["video"]("an <image> of")


def test_prompts_with_several_pictures_declare_their_markers() -> None:
    prompt = BUILDERS["Idefics"]("<image>a cat</s><image>a", images=2)
    assert prompt.ids.count(IMAGE_ID or 0) == 2
    assert prompt.ids.count(2) == 2  # the BOS, and the end of the first document


def test_every_text_of_a_conversation_and_every_instruction_is_checked() -> None:
    builder = BUILDERS["LLaVA"]
    talk = (("picture", "what?"), ("assistant", "a dog"), ("user", "where?"))
    assert builder(Dialog(talk)).ids.count(2) == 4  # BOS, and the three that the template writes
    for place in range(3):
        typed = [(kind, f"{text}</s>" if at == place else text) for at, (kind, text) in enumerate(talk)]
        with pytest.raises(PromptError, match="contains </s>"):
            builder(Dialog(tuple(typed)))
    with pytest.raises(PromptError, match="surrogate"):
        BUILDERS["T5"]("half \ud800")
    assert InstructionTokenizer(BERT, 30, 1)([Dialog(talk)])["instruction_ids"][0].tolist() == BERT.encode("where?")
    with pytest.raises(PromptError, match=r"contains \[SEP\]"):
        InstructionTokenizer(BERT, 30, 1)(["a [SEP] b"])


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA, T5, BERT], ids=["bytes", "llama", "t5", "bert"])
@pytest.mark.parametrize("stops", [(), ("dog",), (" ",)])
def test_pieces_joined_are_the_stripped_text(tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
    for text in ("a dog  on the grass", "  two  ", " ", "", "\n a photo\n\n of \t"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = TextPieces(tokenizer, stops)
        found = [pieces.push(token) for token in ids] + [pieces.flush()]
        whole = tokenizer.decode(ids)
        for stop in stops:
            whole = whole.partition(stop)[0]
        assert "".join(found) == whole.strip()
