"""What a bundle needs beside its graphs: tokenizer, preprocessing, prompt and generation defaults."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.contract import TOKENIZER_FILE, PromptSpec
from blip2edge.errors import BundleError, CheckpointError
from blip2edge.model.checkpoint import read_json
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families import FAMILIES
from blip2edge.runtime.preprocess import Preprocessing
from blip2edge.runtime.tokenizer import Tokenizer

MAX_NEW_TOKENS = 30
"""Default length of a caption: the longest that BLIP-2's own evaluation on COCO allows."""

SAVE_PROCESSOR = "save the processor too: Blip2Processor(...).save_pretrained(DIRECTORY)"


@dataclass(frozen=True)
class SideFiles:
    """Read and checked before anything is written."""

    preprocessing: Preprocessing
    prompt: PromptSpec
    generation: Mapping[str, Any]
    tokenizer: bytes

    @classmethod
    def read(cls, directory: Path, config: CaptionerConfig) -> SideFiles:
        """Reads a checkpoint's processor.

        Raises:
            CheckpointError: It has none, or one that does not fit the model.
        """
        content = _tokenizer(directory)
        _check_tokenizer(content, directory, config)
        family = FAMILIES[config.family]
        prompt = PromptSpec(
            template=family.template,
            question=family.question,
            visual_tokens=config.bridge.num_visual_tokens,
            bos_token_id=config.bos_token_id,
            image_token_id=config.image_token_id,
        )
        generation = {
            "eos_token_ids": list(config.eos_token_ids),
            "pad_token_id": config.pad_token_id,
            "decoder_start_token_id": config.decoder_start_token_id,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        return cls(_preprocessing(directory, config), prompt, generation, content)

    def write(self, bundle: Path) -> None:
        """Puts the tokenizer into a bundle; the rest stands in its manifest."""
        (bundle / TOKENIZER_FILE).write_bytes(self.tokenizer)


def _tokenizer(directory: Path) -> bytes:
    path = directory / TOKENIZER_FILE
    if path.is_file():
        return path.read_bytes()
    if not any(
        (directory / name).is_file()
        for name in ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
    ):
        raise CheckpointError(f"{directory} has no {TOKENIZER_FILE}", SAVE_PROCESSOR)
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(directory, use_fast=True).backend_tokenizer
    except Exception as error:  # transformers raises ValueError, OSError, ImportError and more
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the slow tokenizer of {directory} could not be converted ({reason})", SAVE_PROCESSOR
        ) from error
    return str(backend.to_str()).encode()


def _check_tokenizer(content: bytes, directory: Path, config: CaptionerConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER_FILE
        path.write_bytes(content)
        try:
            tokenizer = Tokenizer.from_file(path)
        except BundleError as error:
            raise CheckpointError(
                f"{directory / TOKENIZER_FILE} is no tokenizer.json", SAVE_PROCESSOR
            ) from error
    ids = tokenizer.encode("a photo of two cats", add_special_tokens=True)
    if max(ids, default=0) >= config.language.vocab_size:
        raise CheckpointError(
            f"{directory / TOKENIZER_FILE} gives the id {max(ids)}, but the language model has "
            f"{config.language.vocab_size} tokens",
            "put the tokenizer there that the language model was trained with",
        )


def _preprocessing(directory: Path, config: CaptionerConfig) -> Preprocessing:
    path = directory / "preprocessor_config.json"
    if path.is_file():
        values = read_json(path)
    elif (directory / "processor_config.json").is_file():
        values = read_json(directory / "processor_config.json").get("image_processor", {})
    else:
        values = {}
    if not values:
        raise CheckpointError(f"{directory} has no preprocessor_config.json", SAVE_PROCESSOR)
    preprocessing = Preprocessing.from_hf(values)
    wanted = (config.vision.image_size, config.vision.image_size)
    if preprocessing.output_size is not None and preprocessing.output_size != wanted:
        height, width = preprocessing.output_size
        raise CheckpointError(
            f"{path.name} makes pictures of {height} x {width}, but the vision encoder takes {wanted[0]} x {wanted[1]}",
            "put the processor there that the model was trained with",
        )
    return preprocessing
