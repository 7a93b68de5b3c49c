"""Reads what a bundle has besides its graphs: tokenizers, preprocessing, prompt and generation defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip2edge.bundle.prompt_spec import MARKERS, VIDEO_MARKER, PromptSpec
from blip2edge.bundle.schema import DRAFT_TOKENIZER_FILE, QFORMER_TOKENIZER_FILE, TOKENIZER_FILE
from blip2edge.errors import CheckpointError
from blip2edge.export.chat import chat_format, unused_template
from blip2edge.model.checkpoint.config_keys import TRANSFORMERS_TYPES, check_config
from blip2edge.model.checkpoint.generation import read_generation
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.checkpoint.side_keys import FROM_CONFIG, PROCESSOR, check_keys, refused, unread_warning
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.checkpoint.tokenizer import SerializedTokenizer, read_tokenizer
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.prompts import prompt_spec
from blip2edge.model.families.registry import FAMILIES
from blip2edge.model.models import Config
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.runtime.images.preprocess import Preprocessing


@dataclass(frozen=True)
class SideFiles:
    """The side files of a checkpoint, checked before anything is written.

    Attributes:
        preprocessing: How a picture becomes pixel values.
        prompt: How a picture and a text become the decoder's input; None for a matching model.
        generation: Default options of captions.
        tokenizer: Content of the bundle's ``tokenizer.json``.
        tokenizer_flags: Settings that ``tokenizer.json`` cannot hold.
        qformer_tokenizer, draft_tokenizer: Contents of ``qformer_tokenizer.json`` and ``draft_tokenizer.json``; None
            if the bundle has no such file.
        warnings: Keys that are not used, one sentence for each file.
    """

    preprocessing: Preprocessing
    prompt: PromptSpec | None
    generation: Mapping[str, Any]
    tokenizer: bytes
    tokenizer_flags: Mapping[str, bool]
    qformer_tokenizer: bytes | None = None
    draft_tokenizer: bytes | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path, config: Config) -> SideFiles:
        """Reads the files of a checkpoint.

        Raises:
            CheckpointError: A file is missing, does not fit the model, or has a value that would change captions and
                is not supported.
        """
        warnings = check_config(directory)
        tokenizer = read_tokenizer(directory)
        warnings += tokenizer.warnings
        warnings += _check_processor(directory, config)
        preprocessing, more = _preprocessing(directory, config)
        warnings += more
        content, flags = tokenizer.content, tokenizer.flags
        if isinstance(config, RetrievalConfig):
            _check_tokenizer(tokenizer, config.text.vocab_size, "the text side")
            warnings += unused_template(directory, "this model matches texts and writes none")
            return cls(preprocessing, None, {}, content, flags, warnings=tuple(warnings))
        family = FAMILIES[config.family]
        slot = "" if family.around_image else family.image_token
        marker = slot or (VIDEO_MARKER if config.frames > 1 else MARKERS[1])  # BLIP-2's processors have these two
        checked = slot or (config.image_token_id is not None and tokenizer.open().token_to_id(marker) is not None)
        picture = (marker, config.image_token_id) if checked else None
        _check_tokenizer(tokenizer, config.language.vocab_size, "the language model", picture)
        if family.around_image:
            _check_markers(tokenizer, (family.image_token, family.around_image))
            if tokenizer.bos_token_id not in (None, config.bos_token_id):  # the processor begins texts with it
                raise CheckpointError(
                    f"{directory}: the tokenizer's bos_token has the id {tokenizer.bos_token_id}, but bos_token_id in "
                    f"config.json is {config.bos_token_id}",
                    "copy the tokenizer that the model was trained with",
                )
        _check_frame(tokenizer, framed=not family.framed, plain=bool(family.around_image))
        instruction = None
        if config.instruction_positions:
            qformer = read_tokenizer(directory / "qformer_tokenizer")
            warnings += qformer.warnings
            _check_tokenizer(qformer, getattr(config.bridge, "vocab_size", 0), "the Q-Former", whole=True)
            if "split_special_tokens" in qformer.flags:  # the manifest has flags for the main tokenizer only
                raise refused(
                    str(qformer.where.with_name("tokenizer_config.json")), "split_special_tokens", True, (False,)
                )
            instruction = qformer.content
        prompt = prompt_spec(config)
        if slot:
            chat = chat_format(directory, slot, family.template)
            prompt = replace(prompt, template=chat.template, turns=chat.turns, framed=chat.framed)
            warnings += chat.warnings
        else:
            warnings += unused_template(directory, f"prompts of {family.title} have the form {family.template!r}")
        generation, more = read_generation(directory, config)
        draft = _draft_tokenizer(directory, config)
        warnings += more
        return cls(preprocessing, prompt, generation, content, flags, instruction, draft, tuple(warnings))

    def write(self, bundle: Path) -> None:
        """Writes the tokenizers to a bundle. The other settings are not written here, but with the manifest."""
        (bundle / TOKENIZER_FILE).write_bytes(self.tokenizer)
        if self.qformer_tokenizer is not None:
            (bundle / QFORMER_TOKENIZER_FILE).write_bytes(self.qformer_tokenizer)
        if self.draft_tokenizer is not None:
            (bundle / DRAFT_TOKENIZER_FILE).write_bytes(self.draft_tokenizer)


def _draft_tokenizer(directory: Path, config: CaptionerConfig) -> bytes | None:
    """Returns the content of the draft model's tokenizer file; None if the checkpoint has no draft model."""
    if config.draft is None:
        return None
    path = directory / DRAFT_TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has a draft model, but no {path.name}",
            "copy it from the directory of the trained draft model",
        )
    tokenizer = SerializedTokenizer(path, path.read_bytes())
    _check_tokenizer(tokenizer, config.draft.vocab_size, "the draft", whole=True)
    return tokenizer.content


def _check_markers(tokenizer: SerializedTokenizer, markers: Sequence[str]) -> None:
    """Raises CheckpointError if the tokenizer lacks one of the ``markers``, the tokens that mark pictures in a text."""
    known = {token["content"] for token in json.loads(tokenizer.content).get("added_tokens", ())}
    missing = [marker for marker in markers if marker not in known]
    if missing:
        raise CheckpointError(
            f"{tokenizer.where} has no token {missing[0]}, which marks pictures in this model's texts",
            "copy the tokenizer that the model was trained with",
        )


def _check_frame(serialized: SerializedTokenizer, *, framed: bool, plain: bool) -> None:
    """Checks the special tokens that the tokenizer adds to a text; two families need this check (BLIP and Idefics).

    Args:
        serialized: The tokenizer.
        framed: Whether the tokenizer must add one token before the text and one after the text (BLIP, where
            transformers replaces the first token and drops the last one).
        plain: Whether the tokenizer must add no token (Idefics, whose processor writes the special tokens).

    Raises:
        CheckpointError: The tokenizer adds other tokens.
    """
    tokenizer = serialized.open()
    text = "a photo"
    alone, whole = (tokenizer.encode(text, add_special_tokens=added) for added in (False, True))
    if framed and whole[1:-1] != alone:
        raise CheckpointError(
            f"{serialized.where}: expected one special token before a text and one after it, got {whole} for {alone}",
            "copy the tokenizer that the model was trained with",
        )
    if plain and whole != alone:
        raise CheckpointError(
            f"{serialized.where}: expected no special tokens around a text, got {whole} for {alone}",
            "set add_bos_token and add_eos_token to false",
        )


def _check_tokenizer(
    serialized: SerializedTokenizer,
    vocab_size: int,
    reader: str,
    image_token: tuple[str, int | None] | None = None,
    whole: bool = False,
) -> None:
    """Raises CheckpointError if the tokenizer gives an id that is not below ``vocab_size``.

    Args:
        serialized: The tokenizer.
        vocab_size: Number of rows of the token table that the ids are used with.
        reader: Name of the model with this table, for errors.
        image_token: The token for a picture, and its id in ``config.json``; the tokenizer must have the same id.
        whole: Whether all tokens are checked. If not, the added tokens are left out, and the ids of a sample text are
            checked as well.
    """
    tokenizer = serialized.open()
    if image_token is not None and tokenizer.token_to_id(image_token[0]) != image_token[1]:
        raise CheckpointError(
            f"{serialized.where} gives {image_token[0]} the id {tokenizer.token_to_id(image_token[0])}, but "
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
            f"{serialized.where} gives the id {max(ids)}, but {reader} has {vocab_size} tokens",
            f"copy the tokenizer that {reader} was trained with",
        )


def _preprocessing(directory: Path, config: Config) -> tuple[Preprocessing, list[str]]:
    """Reads the preprocessing of a checkpoint; returns it with warnings.

    Raises:
        CheckpointError: The preprocessing is missing or not supported, or its pictures have another size than the
            vision encoder needs.
    """
    loaded = load_preprocessing(directory)
    made, wanted = loaded.preprocessing.output_size, config.vision.image_size
    if made != (wanted, wanted):
        size = "varying sizes" if made is None else f"{made[0]} x {made[1]}"
        raise CheckpointError(
            f"{loaded.where} makes pictures of {size}, but the vision encoder takes {wanted} x {wanted}",
            "copy the processor that the model was trained with",
        )
    return loaded.preprocessing, loaded.warnings


def _check_processor(directory: Path, config: Config) -> list[str]:
    """Compares the top-level keys of ``processor_config.json`` with the model; returns warnings.

    Raises:
        CheckpointError: A key makes transformers write another number of visual tokens than the model has, or names
            the processor of another model.
    """
    path = directory / "processor_config.json"
    values = read_checkpoint_json(path) if path.is_file() else {}
    accepted: dict[str, tuple[Any, ...]] = {key: (values.get(key),) for key in FROM_CONFIG}
    if isinstance(config, CaptionerConfig):
        family = FAMILIES[config.family]
        if config.bridge.kind in ("qformer", "instructed-qformer"):
            accepted |= {"num_query_tokens": (config.bridge.num_visual_tokens,)}
        if family.image_token:
            vision: Any = config.vision  # of these families, an encoder with patches
            accepted |= {"image_token": (family.image_token,), "patch_size": (vision.patch_size,)}
            added = values.get("num_additional_image_tokens") or 0
            kept = vision.num_embeds - (vision.image_size // vision.patch_size) ** 2  # besides the patches
            wanted = kept + (values.get("vision_feature_select_strategy") == "default")
            if config.family == "llava" and added != wanted:
                raise refused(str(path), "num_additional_image_tokens", added, (wanted,))
    elif config.family == "blip-2-itm":  # transformers would put placeholders of the picture into the text
        accepted |= {"num_query_tokens": ()}
    _check_processor_class(directory)
    warnings = check_keys(replace(PROCESSOR, checked={**PROCESSOR.checked, **accepted}), values, str(path))
    of_videos = isinstance(config, CaptionerConfig) and config.frames > 1
    unread = "image_processor" if of_videos else "video_processor"
    return warnings + unread_warning(str(path), [unread] if values.get(unread) is not None else [])


def _check_processor_class(directory: Path) -> None:
    """Raises CheckpointError if the first file with a ``processor_class`` names the processor of another model."""
    from transformers.models.auto import processing_auto

    classes: Any = processing_auto
    model_type = read_checkpoint_json(directory / "config.json")["model_type"]
    wanted = classes.PROCESSOR_MAPPING_NAMES.get(TRANSFORMERS_TYPES.get(model_type, model_type))
    paths = [directory / f"{name}_config.json" for name in ("processor", "preprocessor", "tokenizer")]
    for path in paths:
        named = read_checkpoint_json(path).get("processor_class") if path.is_file() else None
        if named is not None:
            if wanted is not None and named != wanted:
                raise refused(str(path), "processor_class", named, (wanted,))
            return
