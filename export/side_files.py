"""The parts of a bundle besides its graphs: tokenizers, preprocessing, prompt and generation defaults."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip2edge.bundle.schema import DRAFT_TOKENIZER_FILE, QFORMER_TOKENIZER_FILE, TOKENIZER_FILE, PromptSpec
from blip2edge.errors import BundleError, CheckpointError, one_line
from blip2edge.export.chat import prompt_template
from blip2edge.model.checkpoint.directory import read_json
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.prompts import prompt_spec
from blip2edge.model.families.registry import FAMILIES
from blip2edge.model.models import Config
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 30
"""Default length of a caption: the limit in BLIP-2's evaluation on COCO."""

PROCESSOR_FILES = (
    ("preprocessor_config.json", ""),
    ("processor_config.json", "image_processor"),
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", ""),
)
"""Where a checkpoint describes its preprocessing: a file and a key in it; the first that exists is used."""

SAVE_PROCESSOR = "save the processor too: Blip2Processor(...).save_pretrained(DIRECTORY)"


@dataclass(frozen=True)
class SideFiles:
    """The side files of a checkpoint, checked before anything is written."""

    preprocessing: Preprocessing
    prompt: PromptSpec | None
    generation: Mapping[str, Any]
    tokenizer: bytes
    qformer_tokenizer: bytes | None = None
    draft_tokenizer: bytes | None = None

    @classmethod
    def read(cls, directory: Path, config: Config) -> SideFiles:
        """Reads a checkpoint's processor.

        Raises:
            CheckpointError: It has no processor, or one that does not fit the model.
        """
        content = _tokenizer(directory)
        if isinstance(config, RetrievalConfig):
            _check_tokenizer(content, directory, config.text.vocab_size, "the text side")
            return cls(_preprocessing(directory, config), None, {}, content)
        family = FAMILIES[config.family]
        slot = "" if family.around_image else family.image_token
        picture = (slot, config.image_token_id) if slot else None
        _check_tokenizer(content, directory, config.language.vocab_size, "the language model", picture)
        if family.around_image:
            _check_markers(content, directory, (family.image_token, family.around_image))
        instruction = None
        if config.instruction_positions:
            folder = directory / "qformer_tokenizer"
            instruction = _tokenizer(folder)
            _check_tokenizer(instruction, folder, getattr(config.bridge, "vocab_size", 0), "the Q-Former", whole=True)
        prompt = prompt_spec(config)
        if slot:
            prompt = replace(prompt, template=prompt_template(directory, slot, family.template))
        generation = {
            "eos_token_ids": _eos(directory, config.eos_token_ids) if family.generation else list(config.eos_token_ids),
            "stop": list(family.stop),
            "pad_token_id": config.pad_token_id,
            "decoder_start_token_id": config.decoder_start_token_id,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        draft = _draft_tokenizer(directory, config)
        return cls(_preprocessing(directory, config), prompt, generation, content, instruction, draft)

    def write(self, bundle: Path) -> None:
        """Writes the tokenizers to a bundle; the other parts are in its manifest."""
        (bundle / TOKENIZER_FILE).write_bytes(self.tokenizer)
        if self.qformer_tokenizer is not None:
            (bundle / QFORMER_TOKENIZER_FILE).write_bytes(self.qformer_tokenizer)
        if self.draft_tokenizer is not None:
            (bundle / DRAFT_TOKENIZER_FILE).write_bytes(self.draft_tokenizer)


def _eos(directory: Path, otherwise: Sequence[int]) -> list[int]:
    """Ids of the end tokens in ``generation_config.json``; ``otherwise`` where it has none."""
    path = directory / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    if found is None:
        return list(otherwise)
    return list(found) if isinstance(found, list) else [found]


def _draft_tokenizer(directory: Path, config: CaptionerConfig) -> bytes | None:
    """The tokenizer of the draft model; None for a checkpoint without one."""
    if config.draft is None:
        return None
    path = directory / DRAFT_TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has a draft model, but no {path.name}",
            "copy it from the directory of the trained draft model",
        )
    content = path.read_bytes()
    _check_tokenizer(content, directory, config.draft.vocab_size, "the draft", whole=True, name=path.name)
    return content


def _tokenizer(directory: Path) -> bytes:
    path = directory / TOKENIZER_FILE
    if path.is_file():
        return path.read_bytes()
    if not any((directory / name).is_file() for name in ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")):
        raise CheckpointError(f"{directory} has no {TOKENIZER_FILE}", SAVE_PROCESSOR)
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(directory, use_fast=True).backend_tokenizer
    except Exception as error:  # transformers raises ValueError, OSError, ImportError and more
        raise CheckpointError(
            f"the slow tokenizer of {directory} could not be converted ({one_line(error)})", SAVE_PROCESSOR
        ) from error
    return str(backend.to_str()).encode()


def _check_markers(content: bytes, directory: Path, markers: Sequence[str]) -> None:
    """Raises CheckpointError where the tokenizer lacks a token that marks pictures."""
    known = {token["content"] for token in json.loads(content).get("added_tokens", ())}
    missing = [marker for marker in markers if marker not in known]
    if missing:
        raise CheckpointError(
            f"{directory / TOKENIZER_FILE} has no token {missing[0]}, which marks pictures in this model's texts",
            "copy the tokenizer that the model was trained with",
        )


def _check_tokenizer(
    content: bytes,
    directory: Path,
    vocab_size: int,
    reader: str,
    image_token: tuple[str, int | None] | None = None,
    whole: bool = False,
    name: str = TOKENIZER_FILE,
) -> None:
    """Raises CheckpointError where an id of a text, or with ``whole`` of any token, is not in the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER_FILE
        path.write_bytes(content)
        try:
            tokenizer = Tokenizer.from_file(path)
        except BundleError as error:
            raise CheckpointError(
                f"{directory / TOKENIZER_FILE} is not a valid tokenizer.json", SAVE_PROCESSOR
            ) from error
    if image_token is not None and tokenizer.token_to_id(image_token[0]) != image_token[1]:
        raise CheckpointError(
            f"{directory / TOKENIZER_FILE} gives {image_token[0]} the id {tokenizer.token_to_id(image_token[0])}, but "
            f"config.json says image_token_index {image_token[1]}",
            "copy the tokenizer that the model was trained with",
        )
    ids = (
        [tokenizer.vocab_size - 1]
        if whole
        else [
            tokenizer.base_vocab_size - 1,
            *tokenizer.encode("a photo of two cats", add_special_tokens=True),
        ]
    )
    if max(ids, default=0) >= vocab_size:
        raise CheckpointError(
            f"{directory / name} gives the id {max(ids)}, but {reader} has {vocab_size} tokens",
            f"copy the tokenizer that {reader} was trained with",
        )


def _preprocessing(directory: Path, config: Config) -> Preprocessing:
    for name, part in PROCESSOR_FILES:
        path = directory / name
        values = read_json(path) if path.is_file() else {}
        values = values.get(part, {}) if part else values
        if values:
            break
    else:
        raise CheckpointError(
            f"{directory} has no processor_config.json and no preprocessor_config.json", SAVE_PROCESSOR
        )
    preprocessing = Preprocessing.from_hf(values)
    wanted = (config.vision.image_size, config.vision.image_size)
    if preprocessing.output_size is not None and preprocessing.output_size != wanted:
        height, width = preprocessing.output_size
        raise CheckpointError(
            f"{path.name} makes pictures of {height} x {width}, but the vision encoder takes {wanted[0]} x {wanted[1]}",
            "copy the processor that the model was trained with",
        )
    return preprocessing
