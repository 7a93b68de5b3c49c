"""Writes a small BERT with random weights and a vocabulary from the captions; the Q-Former starts from this BERT.

    python examples/recipes/photos/words.py --data runs/photos/data/train --out runs/photos/words

Without this BERT, the Q-Former's text side has the vocabulary of the language model: 49,152 tokens, which take most of
a step's time on a CPU. The captions of this recipe have about 110 different words.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertModel

from blip2edge.errors import UsageError
from blip2edge.training.data.folder import captions_of

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
POSITIONS = 32


def small_tokenizer(texts: list[str]) -> Tokenizer:
    """Makes a WordPiece tokenizer with all words of the texts, and all letters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=4000, min_frequency=1, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_bert(texts: list[str], out: Path, *, hidden: int, layers: int, heads: int, seed: int) -> int:
    """Writes the checkpoint of the BERT; returns the size of its vocabulary.

    Raises:
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists", "remove it, or give another directory with --out")
    tokenizer = small_tokenizer(texts)
    size = tokenizer.get_vocab_size()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=POSITIONS,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    return size


def main() -> None:
    """Parses the command line, reads the captions and writes the checkpoint."""
    parser = argparse.ArgumentParser(description="Writes a small BERT with random weights for the captions.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the training pictures")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must not exist")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    paths = sorted(options.data.glob("*.txt"))
    texts = [caption for path in paths for caption in captions_of(path.read_text(encoding="utf-8"))]
    size = write_bert(
        texts,
        options.out,
        hidden=options.hidden_size,
        layers=options.layers,
        heads=options.heads,
        seed=options.seed,
    )
    print(f"{options.out}: {size} tokens")


if __name__ == "__main__":
    main()
