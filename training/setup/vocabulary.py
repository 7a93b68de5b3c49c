"""The miniature's tokenizer: byte-level BPE like OPT's, with one token for each word of the scenes.

As in OPT (Zhang et al., arXiv 2205.01068), `<pad>` has the id 1, and `</s>` has the id 2 and is the first and the last
token of every text. Words without a token of their own are encoded as several tokens, at least as bytes, so every
prompt can be encoded. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from blip2edge.training.data.scenes import COLOURS, RELATIONS, SHAPES, SIZES, all_captions

_UNK, _PAD, _END, IMAGE_TOKEN = "<unk>", "<pad>", "</s>", "<image>"
UNK_ID, PAD_ID, END_ID = 0, 1, 2
_MAX_VOCABULARY = 512  # more entries than the words of the scenes need


def make_tokenizer(prompts: Iterable[str]) -> Tokenizer:
    """Makes the miniature's tokenizer, trained on all captions of the training scenes.

    Args:
        prompts: Short texts whose words also get tokens.

    Returns:
        A tokenizer that begins every text with `</s>`; `<image>` has the last id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        special_tokens=[_UNK, _PAD, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [*all_captions("train"), *prompts]
    tokenizer.train_from_iterator(texts + [f" {text}" for text in texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_END} $A", pair=f"{_END} $A $B", special_tokens=[(_END, END_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    return tokenizer


def keyword_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the token ids of the keywords: the words that determine a caption.

    Args:
        tokenizer: The tokenizer from `make_tokenizer`.

    Returns:
        For each size, colour, shape and relation, the id of the word with a space before it.
    """
    words = [*SIZES, *COLOURS, *SHAPES, *RELATIONS]
    return {word: tokenizer.encode(f" {word}", add_special_tokens=False).ids[-1] for word in words}


def tokenizer_config(max_positions: int) -> dict[str, Any]:
    """Makes the content of `tokenizer_config.json`, so that transformers' AutoTokenizer loads the same tokenizer.

    Args:
        max_positions: Context length of the language model in tokens.

    Returns:
        The JSON object of the file.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _END,
        "eos_token": _END,
        "pad_token": _PAD,
        "unk_token": _UNK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "padding_side": "left",
    }
