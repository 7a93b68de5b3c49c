"""Loads the tokenizer of a checkpoint as transformers' AutoTokenizer does, and serialises it for the runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2edge.bundle.schema import TOKENIZER_FILE
from blip2edge.errors import CheckpointError, one_line
from blip2edge.model.checkpoint.image_processor import SAVE_PROCESSOR
from blip2edge.model.checkpoint.tokenizer_keys import check_tokenizer_keys
from blip2edge.reading import read_bytes, reading
from blip2edge.runtime.text.tokenizer import TOKENIZER_BYTES, Tokenizer, parse_tokenizer

VOCABULARIES = (TOKENIZER_FILE, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Vocabulary files; the directory of a tokenizer has at least one of these."""

FLAGS = ("clean_up_tokenization_spaces", "split_special_tokens")
"""Settings of ``tokenizer_config.json`` that cannot be stored in a ``tokenizer.json``; the manifest stores them."""


@dataclass(frozen=True)
class SerializedTokenizer:
    """A checkpoint's tokenizer in the format of the runtime.

    Attributes:
        where: File that the tokenizer was read from, for errors.
        content: Content of a ``tokenizer.json``.
        flags: The settings in :data:`FLAGS` that are true, as keyword arguments of
            :class:`~blip2edge.runtime.text.tokenizer.Tokenizer`.
        bos_token_id: Id of the tokenizer's BOS token; None if the tokenizer has none.
        warnings: Keys of the tokenizer's files that are not used.
    """

    where: Path
    content: bytes
    flags: dict[str, bool] = field(default_factory=dict)
    bos_token_id: int | None = None
    warnings: tuple[str, ...] = ()

    def open(self) -> Tokenizer:
        """Makes the runtime's tokenizer from the content.

        Raises:
            CheckpointError: The content is no tokenizer.
        """
        return Tokenizer(parse_tokenizer(self.content, self.where, CheckpointError, SAVE_PROCESSOR), **self.flags)


def read_tokenizer(directory: Path) -> SerializedTokenizer:
    """Reads the tokenizer of a directory as AutoTokenizer does: from all its files, not from ``tokenizer.json`` alone.

    ``tokenizer_config.json`` may change the class, the special tokens and the normaliser. A directory that has a
    ``tokenizer.json`` without ``tokenizer_config.json`` and ``config.json`` is used as it is.

    Raises:
        CheckpointError: There is no tokenizer, or transformers cannot load it.
    """
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(f"{directory} has no {TOKENIZER_FILE}", SAVE_PROCESSOR)
    plain = directory / TOKENIZER_FILE
    if plain.is_file() and not any((directory / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        with reading(plain, "a tokenizer", CheckpointError, SAVE_PROCESSOR):
            return SerializedTokenizer(plain, read_bytes(plain, TOKENIZER_BYTES))
    from transformers import AutoTokenizer

    def explain(error: Exception) -> CheckpointError:  # also for an OSError: transformers raises it for any fault
        return CheckpointError(
            f"transformers cannot load the tokenizer of {directory} ({one_line(error)})", SAVE_PROCESSOR
        )

    with reading(directory, "a tokenizer", CheckpointError, SAVE_PROCESSOR, explain=explain):
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"the tokenizer of {directory}, a {type(tokenizer).__name__}, cannot be stored as {TOKENIZER_FILE}",
            "save it with a tokenizer class of transformers that writes this file",
        )
    unread = check_tokenizer_keys(directory, tokenizer)
    backend.no_truncation()
    backend.no_padding()
    flags = {name: True for name in FLAGS if getattr(tokenizer, name, False)}
    return SerializedTokenizer(plain, str(backend.to_str()).encode(), flags, tokenizer.bos_token_id, tuple(unread))
