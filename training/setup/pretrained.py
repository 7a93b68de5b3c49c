"""Opens picture encoders and language models of checkpoints, and assembles captioners with a new bridge.

A picture encoder or language model is opened first: its config and tensor names are checked, but no weights are read.
So a run can compare the memory that it will need with the machine's memory before the weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from blip2edge.bundle.schema import TOKENIZER_FILE
from blip2edge.errors import CheckpointError, ConfigError, some
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.adapters.folder import ADAPTER_CONFIG, has_adapter
from blip2edge.model.checkpoint.directory import load_checkpoint, load_model, read_model_config
from blip2edge.model.checkpoint.encoder import encoder_config, is_encoder, load_encoder
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.checkpoint.stored import files
from blip2edge.model.checkpoint.stored.files import find_checkpoint, read_checkpoint_json
from blip2edge.model.checkpoint.stored.quantized import refuse_quantized
from blip2edge.model.checkpoint.stored.tensors import TensorFiles
from blip2edge.model.checkpoint.stored.tied import add_tied_names, all_equal, repeated_names
from blip2edge.model.checkpoint.tokenizer import read_tokenizer
from blip2edge.model.config import CaptionerConfig, LanguageConfig, VisionEncoderConfig
from blip2edge.model.config_json import Fields
from blip2edge.model.families.registry import FAMILIES
from blip2edge.model.families.tokens import read_tokens
from blip2edge.model.interfaces import DecoderModule, VisionModule
from blip2edge.model.language.registry import LANGUAGES, bridged_language, language_of
from blip2edge.model.layers import shapes_of
from blip2edge.model.weights.rules import WeightMap
from blip2edge.reading import read_bytes, reading
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.text.tokenizer import TOKENIZER_BYTES, parse_tokenizer

_IMAGE_TOKEN = "<image>"
"""The token of a picture in transformers' input_ids, for families that name no other token."""

PROCESSORS: Mapping[str, str] = {
    "blip-2": "Blip2Processor",
    "blip2edge": "Blip2Processor",
    "instructblip": "InstructBlipProcessor",
    "llava": "LlavaProcessor",
    "idefics": "IdeficsProcessor",
}
"""transformers' processor class of each family."""

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def resolve(name: str, base: Path) -> Path:
    """Returns the directory of a checkpoint, named by a path relative to the recipe, an absolute path or a hub name.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    local = base / name
    if not local.exists() and name.startswith((".", "/", "~")):  # no hub name: the error names the path that was tried
        return find_checkpoint(local.resolve())
    return find_checkpoint(local if local.exists() else name)


@dataclass
class LanguagePart:
    """A trained language model with its tokenizer, whose weights are not read yet.

    Attributes:
        config: Config of the language model.
        read: Reads the model's tensors, by the parameter names of this project's module.
        tokens: Ids of the special tokens, as fields of CaptionerConfig.
        tokenizer: Tokenizer of the language model.
        directory: Directory of the model's checkpoint.
        extra: Rows that :meth:`state` appends to token embedding table and head.
    """

    config: LanguageConfig
    read: Callable[[], dict[str, Tensor]]
    tokens: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    directory: Path
    extra: int = 0

    def with_tokens(self, wanted: list[str]) -> int:
        """Adds special tokens to the tokenizer, and plans rows for the token embedding table and head if needed.

        Args:
            wanted: Texts of the special tokens.

        Returns:
            Number of rows that are appended when the weights are read.
        """
        missing = [token for token in wanted if self.tokenizer.token_to_id(token) is None]
        self.tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in missing])
        ids = [self.tokenizer.token_to_id(token) or 0 for token in wanted]
        self.extra = max(0, max(ids, default=0) + 1 - self.config.vocab_size)
        return self.extra

    def state(self) -> dict[str, Tensor]:
        """Reads the tensors of the model, by the parameter names of this project's module.

        Rows for new tokens are the mean of the existing rows, as in transformers' resize_token_embeddings.
        """
        state = self.read()
        for name in ("embed_tokens.weight", "head.weight") if self.extra else ():
            table = state[name]
            mean = table.mean(dim=0, keepdim=True).expand(self.extra, -1)
            state[name] = torch.cat([table, mean])
        return state


def open_language(name: str, base: Path) -> LanguagePart:
    """Opens a language model, or the language model of a captioner, without reading its weights.

    Raises:
        CheckpointError: The checkpoint cannot be read, or has no ``tokenizer.json``.
        UnsupportedModelError: This kind of language model does not work with a bridge.
    """
    directory = resolve(name, base)
    values = read_checkpoint_json(directory / "config.json")
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    if values.get("model_type") not in LANGUAGES:
        given = captioner_config_of(directory)
        fields = ("bos_token_id", "eos_token_ids", "pad_token_id", "decoder_start_token_id")
        tokens = {field: getattr(given, field) for field in fields}
        read = lambda: load_checkpoint(directory).language.state_dict()  # noqa: E731
        return LanguagePart(given.language, read, tokens, tokenizer, directory)
    row = bridged_language(values["model_type"])
    config = row.read_config(values)
    with torch.device("meta"):
        shapes = shapes_of(row.build(config))
    if has_adapter(directory):
        raise CheckpointError(
            f"{directory} has a PEFT adapter ({ADAPTER_CONFIG}); adapters are merged into whole captioners only",
            "merge it first: merge_and_unload() of the PEFT model, then save_pretrained",
        )
    tensors = TensorFiles(directory)
    try:
        tied = config.tie_embeddings
        ties = row.ties if tied else ()
        add_tied_names(tensors, ties)
        tied = tied and all_equal(tensors, [tie for tie in ties if tie[0] == "lm_head.weight"])
        if tied:
            shapes.pop("head.weight")
        rules = WeightMap(row.rules(config), [*row.left_out, r"lm_head\.weight"])
        used = {source for ours in shapes for source in rules.sources(ours)}
        refuse_quantized(values, tensors, used)
        repeated = repeated_names(tensors, ties, used, rules)
        rules.check(shapes, {name: shape for name, shape in tensors.shapes.items() if name not in repeated})
    finally:
        tensors.close()
    if not tied:
        untied: Any = config
        config = replace(untied, tie_embeddings=False)

    def state() -> dict[str, Tensor]:
        files = TensorFiles(directory)
        try:
            add_tied_names(files, ties)
            found = {ours: files.read(rules.sources(ours)).float().clone() for ours in shapes}
        finally:
            files.close()
        return found | {"head.weight": found["embed_tokens.weight"]} if tied else found

    return LanguagePart(config, state, read_tokens(Fields("config.json", values)), tokenizer, directory)


def load_tokenizer(path: Path, *, alone: bool = False) -> tokenizers.Tokenizer:
    """Loads a ``tokenizer.json`` with the package tokenizers.

    Args:
        path: The file.
        alone: Whether to read this file only. If not, files beside it may change it, as AutoTokenizer does.

    Raises:
        CheckpointError: The file is missing, or is not a tokenizer.
    """
    if path.name == TOKENIZER_FILE and not alone:
        content = read_tokenizer(path.parent).content
    elif path.is_file():
        with reading(path, "a tokenizer.json", CheckpointError):
            content = read_bytes(path, TOKENIZER_BYTES)
    else:
        raise CheckpointError(
            f"{path.parent} has no {path.name}",
            "save the tokenizer with transformers: AutoTokenizer.from_pretrained(NAME).save_pretrained(DIRECTORY)",
        )
    return parse_tokenizer(content, path, CheckpointError, "copy or download the file again")


@dataclass
class VisionPart:
    """A trained picture encoder, whose weights are not read yet, and its preprocessing.

    Attributes:
        config: Config of the picture encoder.
        read: Reads the picture encoder; it is in eval mode.
        preprocessing: The preprocessing of pictures that the encoder was trained with.
        file: The preprocessing as the content of `preprocessor_config.json`.
    """

    config: VisionEncoderConfig
    read: Callable[[], VisionModule]
    preprocessing: Preprocessing
    file: bytes


def open_vision(name: str, base: Path) -> VisionPart:
    """Opens a picture encoder from its own checkpoint, or from that of a captioner or retrieval model.

    The weights are not read.

    Raises:
        CheckpointError: The checkpoint cannot be read, or has no preprocessing.
    """
    directory = resolve(name, base)
    alone = is_encoder(directory)
    if alone:
        encoder_config(directory)  # an unsupported encoder is refused by name, before its preprocessing is
    loaded = load_preprocessing(directory)
    size = loaded.preprocessing.output_size
    file = json_file(loaded.values)
    if alone:
        read = partial(load_encoder, directory, size)
        return VisionPart(encoder_config(directory, size), read, loaded.preprocessing, file)
    config = read_model_config(directory).vision
    return VisionPart(config, lambda: load_model(directory).vision, loaded.preprocessing, file)


def captioner_config_of(directory: Path) -> CaptionerConfig:
    """Returns the config of a captioner's checkpoint, without reading its weights.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is not a captioner.
    """
    config = read_model_config(directory)
    if not isinstance(config, CaptionerConfig):
        raise CheckpointError(
            f"{directory} compares pictures with texts and has no language model",
            "give a captioner's checkpoint, or set model.language_from to a language model",
        )
    return config


def side_files(directory: Path) -> dict[str, bytes]:
    """Returns the content of a checkpoint's files besides weights, by file name.

    The new checkpoint gets these files, so a broken JSON file is refused here.

    Raises:
        CheckpointError: A file cannot be read, or is not the JSON that its name says.
    """
    return {name: _read_side_file(path) for name, path in files.find_side_files(directory).items()}


def _read_side_file(path: Path) -> bytes:
    if path.suffix == ".json":
        read_checkpoint_json(path)
    return path.read_bytes()


def tokenizer_files(part: LanguagePart) -> dict[str, bytes]:
    """Makes the tokenizer files of a language model, with the added tokens; returns their content by name."""
    paths = [part.directory / name for name in _TOKENIZER_FILES]
    found = {path.name: _read_side_file(path) for path in paths if path.is_file()}
    return found | {"tokenizer.json": part.tokenizer.to_str(pretty=True).encode()}


def picture_tokens(family: str) -> list[str]:
    """Returns the special tokens that stand for a picture in the texts of a family."""
    row = FAMILIES[family]
    return [row.image_token or _IMAGE_TOKEN, *([row.around_image] if row.around_image else [])]


def assemble_captioner(config: CaptionerConfig, vision: VisionPart, language: LanguagePart) -> CaptionerModel:
    """Assembles a captioner from a trained picture encoder and a trained language model.

    Bridge, text head and gated layers are not yet initialised.

    Args:
        config: The config from `captioner_config`, with special tokens added.
        vision: The picture encoder.
        language: The language model.

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
    for module in new_modules(model):
        module.to_empty(device="cpu")
    model.vision.load_state_dict(vision.read().state_dict(), assign=True)
    missing = _assign(model.language, language.state())
    if missing:
        raise CheckpointError(
            f"{language.directory} lacks the tensors {some(missing)}", "copy or download the checkpoint again"
        )
    return model


def build_language(part: LanguagePart) -> DecoderModule:
    """Reads a language model, in eval mode on the CPU.

    Raises:
        CheckpointError: Tensors are missing.
    """
    with torch.device("meta"):
        language = language_of(part.config.kind).build(part.config)
    missing = _assign(language, part.state())
    if missing:
        raise CheckpointError(
            f"{part.directory} lacks the tensors {some(missing)}", "copy or download the checkpoint again"
        )
    return language.eval()


def new_modules(model: CaptionerModel) -> list[nn.Module]:
    """Returns the modules that no checkpoint provides: bridge, text head and the gated layers of a Flamingo."""
    modules = [model.bridge, model.draft, getattr(model.language, "cross_layers", None)]
    return [module for module in modules if module is not None]


def json_file(values: Mapping[str, Any]) -> bytes:
    """Encodes ``values`` as the content of a JSON file: UTF-8, indented by two spaces."""
    return (json.dumps(dict(values), indent=2) + "\n").encode()


def processor_file(config: CaptionerConfig) -> bytes:
    """Makes the content of `processor_config.json`, which transformers' processor needs to load a checkpoint."""
    return json_file(
        {"processor_class": PROCESSORS[config.family], "num_query_tokens": config.bridge.num_visual_tokens}
    )


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Assigns tensors to a module on the meta device. Returns the names that are still missing."""
    module.load_state_dict(dict(state), strict=False, assign=True)
    language: Any = module
    if language.config.tie_embeddings:
        language.head.weight = language.embed_tokens.weight
    return [name for name, tensor in module.state_dict().items() if tensor.is_meta]


def with_special_tokens(config: CaptionerConfig, language: LanguagePart, image_token: str) -> CaptionerConfig:
    """Returns ``config`` with the special token ids of the language model and the id of ``image_token``."""
    return replace(config, **language.tokens, image_token_id=language.tokenizer.token_to_id(image_token))
