"""What a bundle needs beside its graphs: tokenizer, preprocessing, prompt and generation defaults."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.contract import QFORMER_TOKENIZER_FILE, TOKENIZER_FILE, PromptSpec
from blip2edge.errors import BundleError, CheckpointError
from blip2edge.model.checkpoint import read_json
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families import FAMILIES
from blip2edge.runtime.preprocess import Preprocessing
from blip2edge.runtime.tokenizer import Tokenizer

MAX_NEW_TOKENS = 30
"""Default length of a caption: the longest that BLIP-2's own evaluation on COCO allows."""

PROCESSOR_FILES = (
    ("preprocessor_config.json", ""),
    ("processor_config.json", "image_processor"),
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", ""),
)
"""Where a checkpoint says how pictures become pixel values: a file, and the part of it; the first that is there."""

SAVE_PROCESSOR = "save the processor too: Blip2Processor(...).save_pretrained(DIRECTORY)"


@dataclass(frozen=True)
class SideFiles:
    """Read and checked before anything is written."""

    preprocessing: Preprocessing
    prompt: PromptSpec
    generation: Mapping[str, Any]
    tokenizer: bytes
    qformer_tokenizer: bytes | None = None

    @classmethod
    def read(cls, directory: Path, config: CaptionerConfig) -> SideFiles:
        """Reads a checkpoint's processor.

        Raises:
            CheckpointError: It has none, or one that does not fit the model.
        """
        content = _tokenizer(directory)
        _check_tokenizer(content, directory, config.language.vocab_size, "the language model")
        instruction = None
        if config.instruction_positions:
            folder = directory / "qformer_tokenizer"
            instruction = _tokenizer(folder)
            _check_tokenizer(instruction, folder, getattr(config.bridge, "vocab_size", 0), "the Q-Former")
        family = FAMILIES[config.family]
        prompt = PromptSpec(
            template=family.template,
            question=family.question,
            default=family.default_prompt,
            frames=config.frames,
            instruction_positions=config.instruction_positions,
            visual_tokens=config.frames * config.bridge.num_visual_tokens,
            bos_token_id=config.bos_token_id,
            framed=family.framed,
            required=family.prompt_required,
            image_token_id=config.image_token_id,
        )
        generation = {
            "eos_token_ids": list(config.eos_token_ids),
            "pad_token_id": config.pad_token_id,
            "decoder_start_token_id": config.decoder_start_token_id,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        return cls(_preprocessing(directory, config), prompt, generation, content, instruction)

    def write(self, bundle: Path) -> None:
        """Puts the tokenizers into a bundle; the rest stands in its manifest."""
        (bundle / TOKENIZER_FILE).write_bytes(self.tokenizer)
        if self.qformer_tokenizer is not None:
            (bundle / QFORMER_TOKENIZER_FILE).write_bytes(self.qformer_tokenizer)


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


def _check_tokenizer(content: bytes, directory: Path, vocab_size: int, reader: str) -> None:
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
    if max(ids, default=0) >= vocab_size:
        raise CheckpointError(
            f"{directory / TOKENIZER_FILE} gives the id {max(ids)}, but {reader} has {vocab_size} tokens",
            f"put the tokenizer there that {reader} was trained with",
        )


def _preprocessing(directory: Path, config: CaptionerConfig) -> Preprocessing:
    for name, part in PROCESSOR_FILES:
        path = directory / name
        values = read_json(path) if path.is_file() else {}
        values = values.get(part, {}) if part else values
        if values:
            break
    else:
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
