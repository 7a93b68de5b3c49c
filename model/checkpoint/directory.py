"""Opens checkpoint directories of transformers without loading the weights, loads models, and saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip2edge.bundle.schema import DRAFT_TOKENIZER_FILE
from blip2edge.errors import CheckpointError
from blip2edge.model.bridges.text_head import DRAFT_CONFIG, DRAFT_FILE, DRAFT_PREFIX, write_draft
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig, DraftConfig
from blip2edge.model.families.registry import (
    canonical_name,
    head_names,
    read_config,
    weight_map,
    write_config,
)
from blip2edge.model.layers import shapes_of
from blip2edge.model.models import Config, Model, build_model
from blip2edge.model.weights.rules import WeightMap

SIDE_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "qformer_tokenizer/tokenizer.json",
    "qformer_tokenizer/tokenizer_config.json",
    DRAFT_TOKENIZER_FILE,
)
"""Files of a checkpoint besides its config and weights."""

INDEX = "model.safetensors.index.json"


def find_checkpoint(checkpoint: str | Path) -> Path:
    """A local directory, or a hub name that is fetched into the hub's cache.

    Raises:
        CheckpointError: ``checkpoint`` is neither.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is a file, but a checkpoint is a directory with config.json and *.safetensors",
            "give the directory that holds it",
        )
    name = str(checkpoint)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no directory {name}", "give a checkpoint directory, or a hub name as owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the hub's client raises its own, requests', httpx' and OS errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is no local directory and could not be fetched from the hub ({reason})",
            "check the name and the network, or give a local directory",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: The file is missing, unreadable, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}",
            "give a directory written by transformers' save_pretrained",
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


class TensorFiles:
    """The tensors of a directory's safetensors files, mapped into memory and read one by one.

    Args:
        directory: Where they are.
        rename: Maps a tensor's name to its name in the weight tables.

    Raises:
        CheckpointError: No weights, a shard missing, or a truncated file.
    """

    def __init__(self, directory: Path, rename: Callable[[str], str] = str) -> None:
        self.directory = directory
        self._files = ExitStack()
        self._of: dict[str, tuple[Any, str]] = {}
        self._laid: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _shards(directory):
            self.add(path, rename)

    def add(self, path: Path, rename: Callable[[str], str]) -> None:
        """Maps a further file and renames its tensors.

        Raises:
            CheckpointError: Missing or truncated.
        """
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error})", "copy or download it again"
            ) from error
        for name in file.keys():  # noqa: SIM118  (a safe_open handle, which does not iterate)
            self._of[rename(name)] = (file, name)
            self.shapes[rename(name)] = tuple(file.get_slice(name).get_shape())

    def read(self, names: Iterable[str]) -> Tensor:
        """The tensor ``names[0]``, or several stacked along dimension 0; a view of the mapped file if possible."""
        parts = [self._laid[name] if name in self._laid else self._stored(name) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stored(self, name: str) -> Tensor:
        file, stored = self._of[name]
        return file.get_tensor(stored)

    def lay_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces tensors of the files."""
        self._laid |= tensors
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def close(self) -> None:
        """Unmaps the files."""
        self._of.clear()
        self._laid.clear()
        self._files.close()


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files", "copy or download it again")
        shards = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks {', '.join(missing)}", "copy or download the missing shards")
        return shards
    hint = "give a directory written by transformers' save_pretrained"
    if any(directory.glob("*.bin")):
        hint = "its weights are pickled: load and save it once with transformers, which writes safetensors"
    raise CheckpointError(f"{directory} has no model.safetensors and no {INDEX}", hint)


class Checkpoint:
    """An open checkpoint directory: its config, its weight map and its tensors, which are not loaded yet.

    Raises:
        CheckpointError: Config and tensors do not fit together.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.laid_over: Path | None = None
        config = read_config(read_json(directory / "config.json"))
        self.files = TensorFiles(directory, partial(canonical_name, config))
        if ties_head(config) and head_names(config)["head"] <= self.files.shapes.keys():
            # As in transformers: a head in the file is used even if the config ties it to the token table.
            language: Any = config.language
            config = replace(config, language=replace(language, tie_embeddings=False))
        if isinstance(config, CaptionerConfig) and (directory / DRAFT_CONFIG).is_file():
            draft = DraftConfig.from_json(read_json(directory / DRAFT_CONFIG))
            config = replace(config, draft=draft)
            self.files.add(directory / DRAFT_FILE, DRAFT_PREFIX.__add__)
        self.config = config
        self.map: WeightMap = weight_map(config)
        with torch.device("meta"):
            self.shapes = shapes_of(build_model(self.config))
        self.map.check(self.shapes, self.files.shapes)

    def read(self, ours: str) -> Tensor:
        """Reads our parameter ``ours``, in the checkpoint's dtype."""
        return self.files.read(self.map.sources(ours))

    def lay_over(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Replaces tensors of the directory by trained ones from another file.

        Args:
            tensors: New tensors, by the directory's names.
            path: The file that they come from.

        Raises:
            CheckpointError: A shape differs.
        """
        self.files.lay_over(tensors)
        self.map.check(self.shapes, self.files.shapes)
        self.laid_over = path

    def paths(self) -> list[Path]:
        """Every file that affects the captions."""
        files = [*self.directory.iterdir(), *self.directory.glob("qformer_tokenizer/*")]
        paths = sorted(path for path in files if path.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja"))
        return paths if self.laid_over is None else [*paths, self.laid_over]

    def num_bytes(self) -> int:
        """Size of all safetensors files."""
        return sum(path.stat().st_size for path in _shards(self.directory))


def ties_head(config: Config) -> TypeGuard[CaptionerConfig]:
    """Whether the head shares the weight of the token table."""
    return isinstance(config, CaptionerConfig) and config.language.tie_embeddings


def load_model(source: str | Path | Checkpoint, dtype: torch.dtype = torch.float32) -> Model:
    """Reads a directory (or hub name) into a model in eval mode.

    Args:
        source: A checkpoint of any family; a :class:`Checkpoint` stays open.
        dtype: dtype of all weights.

    Raises:
        CheckpointError: See :class:`Checkpoint`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(find_checkpoint(source))
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    tied = ties_head(checkpoint.config)
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.shapes:
        if name == "language.head.weight" and tied:
            continue
        tensors[name] = checkpoint.read(name).to(dtype, copy=True)
    if checkpoint is not source:
        checkpoint.files.close()
    if tied:
        tensors["language.head.weight"] = tensors["language.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_checkpoint(directory: str | Path, dtype: torch.dtype = torch.float32) -> CaptionerModel:
    """Reads a captioner; arguments and errors as :func:`load_model`.

    Raises:
        CheckpointError: It is a retrieval model, which generates no text; or as :func:`load_model`.
    """
    model = load_model(directory, dtype)
    if not isinstance(model, CaptionerModel):
        raise CheckpointError(
            f"{directory} compares pictures with texts and generates none", "give a captioner's checkpoint"
        )
    return model


def to_hf_tensors(model: Model) -> dict[str, Tensor]:
    """The state of a model under transformers' names, without a tied head."""
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

    The text head (draft model) goes to files of its own, which transformers ignores.

    Args:
        model: The model to save.
        directory: Where to write; created if missing.
        like: A checkpoint whose tokenizer and processor files are copied, that of the text head included.
        dtype: dtype of the saved weights; None keeps the model's.
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
    for name in SIDE_FILES if like is not None else ():
        source = Path(like or ".") / name
        if source.is_file() and source.resolve() != (target / name).resolve():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target / name)
