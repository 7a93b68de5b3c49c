"""Opens checkpoint directories of transformers without loading the weights, loads models, and saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2edge.errors import CheckpointError
from blip2edge.model.bridges.text_head import DRAFT_CONFIG, DRAFT_FILE, DRAFT_PREFIX, write_draft
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.adapters.folder import base_of, has_adapter, merged_tensors
from blip2edge.model.checkpoint.generation import end_tokens
from blip2edge.model.checkpoint.stored.files import (
    CHECKPOINT_FILES,
    copy_side_files,
    find_checkpoint,
    find_side_files,
    joined_side_files,
    matching,
    read_checkpoint_json,
)
from blip2edge.model.checkpoint.stored.layouts import has_weights, no_weights
from blip2edge.model.checkpoint.stored.quantized import refuse_quantized
from blip2edge.model.checkpoint.stored.tensors import TensorFiles, shards
from blip2edge.model.checkpoint.stored.tied import add_tied_names, all_equal, repeated_names
from blip2edge.model.config import CaptionerConfig, DraftConfig
from blip2edge.model.families.registry import (
    canonical_name,
    head_and_table,
    read_config,
    ties_of,
    weight_map,
    write_config,
)
from blip2edge.model.layers import shapes_of
from blip2edge.model.models import Config, Model, build_model
from blip2edge.model.weights.rules import WeightMap
from blip2edge.model.weights.ties import Tie
from blip2edge.reading import naming_config

HEAD = "language.head.weight"


class Checkpoint:
    """An open checkpoint: its config, its weight map and its tensors, which are not loaded yet.

    An adapter in the directory is merged into the tensors when they are read.

    Args:
        given: A directory with weights, with a PEFT adapter, or with both.
        base: The directory with the weights that an adapter changes; None for the directory that the adapter names.

    Attributes:
        directory: The directory with config and weights: ``given``, or the base of the adapter in ``given``.
        laid_over: The file with trained tensors that replace tensors of the directory; None if there is none.
        config: Config of the model. Its head counts as tied only if the tensors of head and token table are equal.
        ties: Pairs of names of tensors that are tied according to ``config.json``.
        map: Maps the parameters of this project's model to the checkpoint's tensors.
        shapes: Shapes of the parameters of this project's model.

    Raises:
        CheckpointError: Config and tensors do not fit together, or the weights are quantised.
        MissingPackageError: There is an adapter, and peft is not installed.
    """

    def __init__(self, given: Path, base: Path | None = None) -> None:
        self.given = given
        self.directory = base_of(given, base) if has_adapter(given) else given
        self.laid_over: Path | None = None
        if not (self.directory / "config.json").is_file() and not has_weights(self.directory):
            raise no_weights(self.directory)
        file = self.directory / "config.json"
        values = read_checkpoint_json(file)
        with naming_config(str(file)):
            self._read = read_config(values)
        rename = partial(canonical_name, self._read)
        self.files = TensorFiles(self.directory, rename)
        self.ties: tuple[Tie, ...] = ties_of(self._read)
        add_tied_names(self.files, self.ties)
        if isinstance(self._read, CaptionerConfig):
            ends = end_tokens(given, self._read) or end_tokens(self.directory, self._read)
            self._read = replace(self._read, end_token_ids=ends)
        if isinstance(self._read, CaptionerConfig) and (self.directory / DRAFT_CONFIG).is_file():
            draft = DraftConfig.from_json(read_checkpoint_json(self.directory / DRAFT_CONFIG))
            self._read = replace(self._read, draft=draft)
            self.files.add(self.directory / DRAFT_FILE, DRAFT_PREFIX.__add__)
        refuse_quantized(values, self.files, self._used(self._read))
        if has_adapter(given):
            architecture = write_config(self._read).get("architectures", ["of this family"])[0]
            for name, (shape, read) in merged_tensors(given, self.directory, architecture, self.files, rename).items():
                self.files.put(name, shape, read)
        self._fit()

    def _fit(self) -> None:
        """Sets ``config``, ``map`` and ``shapes``, and checks names and shapes of all tensors.

        The head is tied to the token table only if the tensors of both are equal.

        Raises:
            CheckpointError: Config and tensors do not fit together.
        """
        config = self._read
        if ties_head(config):
            # As in transformers: tensors that differ are used as they are, even if the config ties them.
            tied = all_equal(self.files, head_and_table(config))
            language: Any = config.language
            config = replace(config, language=replace(language, tie_embeddings=tied))
        self.config: Config = config
        self.map: WeightMap = weight_map(config)
        with torch.device("meta"):
            self.shapes = shapes_of(build_model(config))
        repeated = repeated_names(self.files, self.ties, self._used(config), self.map)
        found = {name: shape for name, shape in self.files.shapes.items() if name not in repeated}
        self.map.check(self.shapes, found)

    def _used(self, config: Config) -> set[str]:
        """Returns the names of the checkpoint's tensors that are weights of a model with this config."""
        names = weight_map(config)
        with torch.device("meta"):
            return {source for ours in shapes_of(build_model(config)) for source in names.sources(ours)}

    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the model's parameters; a tied head is left out, because it is the token table."""
        tied = {HEAD} if ties_head(self.config) else set()
        return {name: shape for name, shape in self.shapes.items() if name not in tied}

    def read(self, ours: str) -> Tensor:
        """Reads the model's parameter ``ours``: in float32 if an adapter changes it, else in the checkpoint's dtype."""
        return self.files.read(self.map.sources(ours))

    def lay_over(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Replaces tensors of the directory by trained tensors from another file.

        Args:
            tensors: New tensors, by the names of the directory's tensors that they replace.
            path: The file of the new tensors.

        Raises:
            CheckpointError: A shape differs.
        """
        self.files.lay_over(tensors)
        self._fit()
        self.laid_over = path

    def paths(self) -> list[Path]:
        """Returns the path of every file that affects the captions."""
        folders = dict.fromkeys([self.directory, self.given])
        paths = [path for folder in folders for path in matching(folder, CHECKPOINT_FILES).values()]
        return paths if self.laid_over is None else [*paths, self.laid_over]

    def side_directory(self) -> Path:
        """Returns a directory with config, tokenizer, processor and chat template.

        An adapter's directory may hold some of these files; the base holds the others. In this case the directory is a
        temporary one with links to the files of both.
        """
        if self.given == self.directory or not find_side_files(self.given):
            return self.directory
        folder = self.files.folder()
        joined = joined_side_files(self.given, self.directory) | {"config.json": self.directory / "config.json"}
        for name, path in joined.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path.resolve())
        return folder

    def num_bytes(self) -> int:
        """Returns the size of all safetensors files in bytes."""
        return sum(path.stat().st_size for path in shards(self.directory))


def ties_head(config: Config) -> TypeGuard[CaptionerConfig]:
    """Returns whether the model is a captioner whose head is tied: it uses the weight of the token table."""
    return isinstance(config, CaptionerConfig) and config.language.tie_embeddings


def read_model_config(source: str | Path) -> Config:
    """Returns the config of a checkpoint of any family (directory or hub name); names and shapes are checked.

    The weights are not read, except to compare a head with the token table.

    Raises:
        CheckpointError: There is no such checkpoint, or its config and tensors do not fit together.
    """
    checkpoint = Checkpoint(find_checkpoint(source))
    checkpoint.files.close()
    return checkpoint.config


def load_model(source: str | Path | Checkpoint, dtype: torch.dtype = torch.float32) -> Model:
    """Reads a directory (or hub name) into a model in eval mode.

    Args:
        source: Directory or hub name of a checkpoint of any family, or an open :class:`Checkpoint`, which stays open.
        dtype: dtype of all weights.

    Raises:
        CheckpointError: Config and tensors do not fit together, or the weights are quantised.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(find_checkpoint(source))
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    tensors = {name: checkpoint.read(name).to(dtype, copy=True) for name in checkpoint.own_shapes()}
    if checkpoint is not source:
        checkpoint.files.close()
    if ties_head(checkpoint.config):
        tensors[HEAD] = tensors["language.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_checkpoint(directory: str | Path, dtype: torch.dtype = torch.float32) -> CaptionerModel:
    """Reads a captioner into a model in eval mode.

    Args:
        directory: Directory or hub name of the checkpoint.
        dtype: dtype of all weights.

    Raises:
        CheckpointError: The checkpoint cannot be read, or it is a retrieval model, which generates no text.
    """
    model = load_model(directory, dtype)
    if not isinstance(model, CaptionerModel):
        raise CheckpointError(
            f"{directory} compares pictures with texts and generates no text", "give a captioner's checkpoint"
        )
    return model


def to_hf_tensors(model: Model) -> dict[str, Tensor]:
    """Returns the tensors of a model by transformers' names; the head is left out if it is tied."""
    names = weight_map(model.config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for source, part in names.split(name, tensor.detach()).items():
            tensors[source] = part.contiguous().cpu()
    return tensors


def save_checkpoint(
    model: Model,
    directory: str | Path,
    *,
    like: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a directory that ``transformers.Blip2ForConditionalGeneration.from_pretrained`` loads.

    The text head (draft model) is written to separate files, which transformers ignores.

    Args:
        model: The model to save.
        directory: Where to write; created if missing.
        like: A checkpoint whose tokenizer and processor files are copied, and the text head's tokenizer if it has one.
        dtype: dtype of the saved weights; None for the dtype of the model.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tensors = to_hf_tensors(model)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    config = write_config(model.config) | {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
    drafted = {name: tensors.pop(name) for name in list(tensors) if name.startswith(DRAFT_PREFIX)}
    if drafted and isinstance(model.config, CaptionerConfig) and model.config.draft is not None:
        write_draft(
            target,
            {name.removeprefix(DRAFT_PREFIX): part for name, part in drafted.items()},
            model.config.draft,
        )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if like is not None:
        copy_side_files(Path(like), target)
