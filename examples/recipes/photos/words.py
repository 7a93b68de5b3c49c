"""Writes a small BERT with random weights and a vocabulary from the captions; the Q-Former starts from this BERT.

    python examples/recipes/photos/words.py --data runs/photos/data/train --out runs/photos/words

Without this BERT, the Q-Former's text side has the vocabulary of the language model: 49,152 tokens, which take most of
a step's time on a CPU. The captions of this recipe have about 110 different words.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from blip2edge.cli import run_script
from blip2edge.errors import DataError
from blip2edge.examples.recipes.outputs import check_new
from blip2edge.reading import read_text
from blip2edge.training.data.folder import captions_of

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
POSITIONS = 32
PREPARE = "write them first: python examples/recipes/photos/prepare.py --out DATA, then give DATA/train"


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


def read_captions(folder: Path) -> list[str]:
    """Returns the captions of all text files in a folder.

    Raises:
        DataError: There is no such folder, or it has no captions.
    """
    texts = [caption for path in sorted(folder.glob("*.txt")) for caption in captions_of(read_text(path, DataError))]
    if not texts:
        state = "it has none" if folder.is_dir() else "there is no such folder"
        raise DataError(f"expected {folder} to have .txt files with captions, but {state}", PREPARE)
    return texts


def write_bert(texts: list[str], out: Path, *, hidden: int, layers: int, heads: int, seed: int) -> int:
    """Writes the checkpoint of the BERT; returns the size of its vocabulary.

    Raises:
        OutputError: `out` exists.
    """
    import torch  # here, so that missing captions are told before these imports, which take seconds
    from transformers import BertConfig, BertModel

    check_new(out)
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
    check_new(options.out)
    size = write_bert(
        read_captions(options.data),
        options.out,
        hidden=options.hidden_size,
        layers=options.layers,
        heads=options.heads,
        seed=options.seed,
    )
    print(f"{options.out}: {size} tokens")


if __name__ == "__main__":
    run_script(main)
