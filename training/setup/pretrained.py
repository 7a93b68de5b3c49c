"""Trained parts read from checkpoints, and put together to a captioner whose bridge is still to be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from blip2edge.errors import CheckpointError, ConfigError
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import (
    SIDE_FILES,
    TensorFiles,
    find_checkpoint,
    load_checkpoint,
    load_model,
    read_json,
)
from blip2edge.model.config import CaptionerConfig, LanguageConfig
from blip2edge.model.config_json import Fields
from blip2edge.model.families.registry import FAMILIES
from blip2edge.model.families.tokens import read_tokens
from blip2edge.model.language.registry import LANGUAGES, bridged_language
from blip2edge.model.vision.vit import VisionTransformer
from blip2edge.model.weights.rules import WeightMap, some
from blip2edge.runtime.images.preprocess import Preprocessing

PICTURE = "<image>"
"""The token that stands for a picture's slots in transformers' input_ids, where a family names no other."""

PROCESSORS: Mapping[str, str] = {
    "blip-2": "Blip2Processor",
    "blip2edge": "Blip2Processor",
    "instructblip": "InstructBlipProcessor",
    "llava": "LlavaProcessor",
    "idefics": "IdeficsProcessor",
}
"""transformers' class that reads a family's tokenizer and preprocessing."""

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def resolve(name: str, base: Path) -> Path:
    """A directory that a recipe names: relative to it, absolute, or in the hub.

    Raises:
        CheckpointError: It is none of these.
    """
    local = base / name
    return find_checkpoint(local if local.exists() else name)


@dataclass
class LanguagePart:
    """A language model and what belongs to it.

    Attributes:
        config: Its sizes.
        state: Its tensors, by our names.
        tokens: Its special ids, as fields of CaptionerConfig.
        tokenizer: Its own.
        directory: Where it came from.
    """

    config: LanguageConfig
    state: dict[str, Tensor]
    tokens: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    directory: Path

    def with_tokens(self, wanted: list[str]) -> int:
        """Adds special tokens to the tokenizer, and rows to the tables where they lack one.

        New rows are the mean of the others, as in transformers' resize_token_embeddings.

        Args:
            wanted: Tokens.

        Returns:
            How many rows were added behind those of the config.
        """
        missing = [token for token in wanted if self.tokenizer.token_to_id(token) is None]
        self.tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in missing])
        ids = [self.tokenizer.token_to_id(token) or 0 for token in wanted]
        extra = max(0, max(ids, default=0) + 1 - self.config.vocab_size)
        for name in ("embed_tokens.weight", "head.weight") if extra else ():
            table = self.state[name]
            mean = table.mean(dim=0, keepdim=True).expand(extra, -1)
            self.state[name] = torch.cat([table, mean])
        return extra


def load_language(name: str, base: Path) -> LanguagePart:
    """A language model by itself, or that of a captioner.

    Raises:
        CheckpointError: It cannot be read, or has no tokenizer.json.
        UnsupportedModelError: No bridge can feed it.
    """
    directory = resolve(name, base)
    values = read_json(directory / "config.json")
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    if values.get("model_type") not in LANGUAGES:
        model = load_checkpoint(directory)
        fields = ("bos_token_id", "eos_token_ids", "pad_token_id", "decoder_start_token_id")
        tokens = {field: getattr(model.config, field) for field in fields}
        return LanguagePart(model.config.language, model.language.state_dict(), tokens, tokenizer, directory)
    row = bridged_language(values["model_type"])
    config = row.read_config(values)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in row.build(config).state_dict().items()}
    files = TensorFiles(directory)
    tied = config.tie_embeddings
    if tied:
        shapes.pop("head.weight")
    rules = WeightMap(row.rules(config), [*row.left_out, r"lm_head\.weight"])
    try:
        rules.check(shapes, files.shapes)
        state = {ours: files.read(rules.sources(ours)).float().clone() for ours in shapes}
    finally:
        files.close()
    if tied:
        state["head.weight"] = state["embed_tokens.weight"]
    return LanguagePart(config, state, read_tokens(Fields("config", values)), tokenizer, directory)


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer of the package tokenizers.

    Raises:
        CheckpointError: The file is missing or no tokenizer.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}",
            "save it there with transformers: AutoTokenizer.from_pretrained(NAME).save_pretrained(DIRECTORY)",
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception for every fault of the file
        raise CheckpointError(f"{path} is no tokenizer.json ({error})") from error


@dataclass
class VisionPart:
    """A picture encoder and its preprocessing.

    Attributes:
        module: In eval mode.
        preprocessing: As it was trained.
        file: The same as `preprocessor_config.json`.
    """

    module: VisionTransformer
    preprocessing: Preprocessing
    file: bytes


def load_vision(name: str, base: Path) -> VisionPart:
    """The picture encoder of a captioner or of a model that compares.

    Raises:
        CheckpointError: It cannot be read, or has no preprocessing.
    """
    directory = resolve(name, base)
    preprocessing, content = load_preprocessing(directory)
    return VisionPart(load_model(directory).vision, preprocessing, content)


def load_preprocessing(directory: Path) -> tuple[Preprocessing, bytes]:
    """A checkpoint's preprocessing, and the file that says so.

    Raises:
        CheckpointError: It has none.
    """
    path = directory / "preprocessor_config.json"
    if not path.is_file() and (directory / "processor_config.json").is_file():
        inner = read_json(directory / "processor_config.json").get("image_processor")
        if isinstance(inner, Mapping):
            return Preprocessing.from_hf(inner), (json.dumps(dict(inner), indent=2) + "\n").encode()
    return Preprocessing.from_hf(read_json(path)), path.read_bytes()


def side_files(directory: Path) -> dict[str, bytes]:
    """What stands beside the weights of a whole checkpoint, by name."""
    return {name: (directory / name).read_bytes() for name in SIDE_FILES if (directory / name).is_file()}


def tokenizer_files(part: LanguagePart) -> dict[str, bytes]:
    """The tokenizer of a language model, with the tokens that were added, and what stands beside it."""
    found = {
        name: (part.directory / name).read_bytes()
        for name in _TOKENIZER_FILES
        if (part.directory / name).is_file()
    }
    return found | {"tokenizer.json": part.tokenizer.to_str(pretty=True).encode()}


def picture_tokens(family: str) -> list[str]:
    """The tokens that a family's texts hold for a picture."""
    row = FAMILIES[family]
    return [row.image_token or PICTURE, *([row.around_image] if row.around_image else [])]


def put_together(config: CaptionerConfig, vision: VisionPart, language: LanguagePart) -> CaptionerModel:
    """A captioner of trained parts and a bridge that is still to be drawn.

    Args:
        config: What `architecture` made, with its special tokens.
        vision: Its picture encoder.
        language: Its language model; gated layers between those of a Flamingo are still to be drawn too.

    Raises:
        ConfigError: The language model has no end token.
        CheckpointError: Tensors are missing.
    """
    if not config.eos_token_ids:
        raise ConfigError(
            f"the language model in {language.directory} has no end token",
            "set eos_token_id in its config.json",
        )
    with torch.device("meta"):
        model = CaptionerModel(config)
    drawn = [model.bridge, *([] if model.draft is None else [model.draft])]
    gated = getattr(model.language, "cross_layers", None)
    drawn += [] if gated is None else [gated]
    for module in drawn:
        module.to_empty(device="cpu")
    model.vision.load_state_dict(vision.module.state_dict(), assign=True)
    missing = _assign(model.language, language.state)
    if missing:
        raise CheckpointError(f"{language.directory} lacks {some(missing)}", "give a whole language model")
    return model


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Puts tensors in place of those on the meta device; the names that stay there."""
    module.load_state_dict(dict(state), strict=False, assign=True)
    language: Any = module
    if language.config.tie_embeddings:
        language.head.weight = language.embed_tokens.weight
    return [name for name, tensor in module.state_dict().items() if tensor.is_meta]


def with_special_tokens(config: CaptionerConfig, language: LanguagePart, image_token: str) -> CaptionerConfig:
    """The config with the language model's special ids."""
    return replace(config, **language.tokens, image_token_id=language.tokenizer.token_to_id(image_token))
