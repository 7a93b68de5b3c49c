"""Tokenizers of each kind compared with transformers' fast tokenizer, also incrementally, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from blip2edge.errors import BundleError
from blip2edge.runtime.text.tokenizer import StopText, TextStream, Tokenizer, clean_up_spaces

pytest.importorskip("transformers", reason="the oracle is transformers")
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "a photo of a dog, sitting on the grass .",
    "two men aren't playing football; it's raining!  Don't they 've umbrellas ?",
    "  leading and trailing spaces  ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "猫がソファの上で眠っている。 кошка спит на диване",
    "emoji: 👩‍👩‍👧‍👦 🏳️‍🌈 🐕 and é (combined) and é",
    "tabs\tand\nnew lines\r\n",
    "",
]
CORPUS = [text for text in TEXTS[:4] if text] * 3


def byte_level() -> Backend:
    """GPT-2 and OPT: byte-level BPE, a BOS by template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken("<image>", special=True)])
    backend.add_tokens([AddedToken("DOG", special=False)])
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    backend.enable_truncation(5)
    backend.enable_padding(length=20, pad_id=1, pad_token="<pad>")
    return backend


def llama() -> Backend:
    """Llama: BPE over ▁-joined text, bytes for what is unknown."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "a"), ("▁", "d"), ("o", "g"), ("▁d", "og"), ("▁", "▁"), ("i", "n"), ("in", "g")]
    pieces = ["▁", *dict.fromkeys("".join(TEXTS[:3]).replace(" ", "")), *("".join(pair) for pair in merges)]
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram() -> Backend:
    """T5: Unigram over Metaspace, an end token by template."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def wordpiece(cleanup: bool = True) -> Backend:
    """BERT: lower-cased WordPiece between [CLS] and [SEP]."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def no_decoder() -> Backend:
    backend = wordpiece()
    backend.decoder = None
    return backend


KINDS: dict[str, tuple[Callable[[], Backend], bool]] = {
    "byte-level": (byte_level, False),
    "byte-level, clean-up asked for": (byte_level, True),
    "llama": (llama, False),
    "unigram": (unigram, False),
    "unigram, clean-up": (unigram, True),
    "wordpiece": (wordpiece, False),
    "wordpiece, clean-up": (lambda: wordpiece(cleanup=False), True),
    "no decoder": (no_decoder, False),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer and transformers' over the same file."""
    make, clean_up = KINDS[request.param]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    make().save(str(path))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=clean_up)
    return Tokenizer.from_file(path, clean_up_tokenization_spaces=clean_up), theirs


def id_lists(tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of texts, and random ones as an untrained model emits them."""
    rng = np.random.default_rng(0)
    lists = [tokenizer.encode(text) for text in TEXTS]
    size = tokenizer.vocab_size
    lists += [rng.integers(0, size, count).tolist() for count in rng.integers(1, 60, 60)]
    lists += [[ids[int(rng.integers(len(ids)))] for _ in range(30)] for ids in lists[:6]]  # words in disorder
    quotes = [i for i in range(size) if set(tokenizer.id_to_token(i) or "?") <= set(" ▁Ġ'.,?!ntsmver#")]
    lists += [rng.choice(quotes, 25).tolist() for _ in range(60)]
    raw = [i for i in range(size) if (tokenizer.id_to_token(i) or "").startswith("<0x")]
    lists += [rng.choice([*raw[0x80:], *raw[:5], size - 1], 25).tolist() for _ in range(20) if raw]
    return [[int(i) for i in ids] for ids in lists]


def test_encode_is_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for text in [*TEXTS, "a DOG <image></s> [SEP] dog"]:
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, add_special_tokens=special)["input_ids"]
    assert ours.vocab_size == len(theirs)


def test_decode_is_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    lists = id_lists(ours)
    for skip in (True, False):
        assert [ours.decode(ids, skip) for ids in lists] == theirs.batch_decode(lists, skip_special_tokens=skip)
    beyond = [ours.vocab_size + 3, *lists[0], ours.vocab_size]
    assert ours.decode(beyond) == theirs.decode(beyond, skip_special_tokens=True)
    assert ours.decode(np.array(lists[0], np.int64)) == ours.decode(lists[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("skip", [True, False])
def test_stream_adds_up_to_decode(pair: tuple[Tokenizer, Any], skip: bool) -> None:
    tokenizer, _ = pair
    stream = TextStream(tokenizer, skip)
    for ids in id_lists(tokenizer):
        pieces = [stream.push(token_id) for token_id in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip)
    assert stream.push(tokenizer.vocab_size + 7) == ""
    assert stream.flush() == ""


def test_stream_of_a_long_text_is_prompt_and_decodes_short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (byte_level, llama, unigram, wordpiece):
        tokenizer = Tokenizer(make())
        ids = tokenizer.encode("a dog on the grass , playing. " * 30, add_special_tokens=False)
        lengths: list[int] = []
        decode = Tokenizer.decode_raw

        def counted(
            self: Tokenizer, ids: Any, skip_special_tokens: bool = True, log: Any = lengths, raw: Any = decode
        ) -> str:
            log.append(len(ids))
            return raw(self, ids, skip_special_tokens)

        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "decode_raw", counted)
            stream = TextStream(tokenizer)
            text = ""
            for at, token_id in enumerate(ids):
                text += stream.push(token_id)
                assert len(text) >= len(decode(tokenizer, ids[: at + 1])) - 1
            text += stream.flush()
        assert text == tokenizer.decode(ids)
        assert max(lengths) <= 17


def test_stream_waits_for_whole_characters() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("ok 🐕!", add_special_tokens=False)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == "ok 🐕!"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🐕" in pieces
    assert pieces.count("") == 3  # the first three of four bytes
    cut = [stream.push(token_id) for token_id in ids[:-2]]
    assert "".join(cut) == "ok "
    assert stream.flush() == "\ufffd"


def test_stream_holds_a_run_of_byte_tokens_until_it_ends() -> None:
    tokenizer = Tokenizer(llama())
    dog = [3 + byte for byte in "🐕".encode()]
    word = tokenizer.encode(" a", add_special_tokens=False)
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in dog] == [""] * 4
    assert "".join(stream.push(token_id) for token_id in word) == "🐕  a"
    assert stream.flush() == ""
    assert [stream.push(token_id) for token_id in [*dog, dog[0]]] == [""] * 5
    assert stream.flush() == "\ufffd" * 5  # one broken byte breaks its run


def test_clean_up_is_transformers(pair: tuple[Tokenizer, Any]) -> None:
    _, theirs = pair
    rng = np.random.default_rng(1)
    for _ in range(300):
        text = "".join(rng.choice(list(" ''nntvre.,a"), 20))
        assert clean_up_spaces(text) == theirs.clean_up_tokenization(text)


def test_clean_up_in_a_stream_of_single_characters() -> None:
    letters = {letter: at for at, letter in enumerate(" 'nntvremsa.,?!"[::-1])}
    backend = Backend(models.WordLevel(letters, unk_token="a"))
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer(backend, clean_up_tokenization_spaces=True)
    rng, held = np.random.default_rng(2), 0
    for _ in range(1500):
        ids = [letters[letter] for letter in rng.choice(list("   ''' nntvremsa.,"), 24)]
        stream = TextStream(tokenizer)
        pieces = [stream.push(token_id) for token_id in ids]
        held += pieces.count("")
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert held


def test_tokens_and_ids() -> None:
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.token_to_id("</s>") == 2
    assert tokenizer.id_to_token(2) == "</s>"
    assert tokenizer.token_to_id("nothing of the kind") is None
    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.id_to_token(-1) is None
    image = tokenizer.token_to_id("<image>")
    assert tokenizer.special_ids == {0, 1, 2, 3, image}


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"cannot be read as a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("cuts", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("a cat ## on a mat ### Human", ("###",), "a cat ## on a mat "),
        ("a cat ##", ("###",), "a cat ##"),
        ("ababac", ("abac",), "ab"),
        ("one.two;three", (";", "."), "one"),
        ("no stop at all", (), "no stop at all"),
    ],
)
def test_stop_text_is_the_text_before_the_first_stop(text: str, stops: tuple[str, ...], wanted: str, cuts: int) -> None:
    stream = StopText(stops)
    pieces = [stream.push(text[at : at + cuts]) for at in range(0, len(text), cuts)]
    assert "".join([*pieces, stream.flush()]) == wanted
