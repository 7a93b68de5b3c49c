"""Finds a checkpoint directory, lists its side files (:data:`SIDE_FILES`), and reads its JSON files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from blip2edge import reading
from blip2edge.bundle.hub.download import hub_client
from blip2edge.bundle.hub.errors import hub_errors
from blip2edge.bundle.hub.names import HubName, is_hub_name
from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.schema import DRAFT_TOKENIZER_FILE
from blip2edge.errors import CheckpointError, UsageError
from blip2edge.progress import ProgressCallback, transfer_progress

MB = 1_000_000

SIDE_GROUPS = (
    (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab*",
        "merges.txt",
        "*.model",
        "*.tiktoken",
        "tekken.json",
    ),
    ("*processor_config.json",),
    ("generation_config.json",),
    ("chat_template*", "*.jinja", "additional_chat_templates/*.jinja"),
    ("qformer_tokenizer/*",),
    (DRAFT_TOKENIZER_FILE,),
)
"""Glob patterns of the files that affect the captions, without config and weights.

The files of one group belong together: the tokenizer, the processor, generation defaults, chat templates, the
Q-Former's tokenizer, the draft model's tokenizer.
"""

SIDE_FILES = tuple(pattern for group in SIDE_GROUPS for pattern in group)
"""Glob patterns of the side files, without groups.

Export reads these files, ``save_checkpoint`` copies them, and the hash of a bundle's source includes them.
"""

CHECKPOINT_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.bin",
    "draft.json",
    "stage1.json",
    "quant*_config.json",
    *SIDE_FILES,
)
"""Glob patterns of all files that affect the captions. Only these are downloaded from the hub."""


def matching(directory: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Returns the files of a directory that match a glob pattern, by path relative to the directory, sorted."""
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return {path.relative_to(directory).as_posix(): path for path in sorted(found)}


def find_side_files(directory: Path) -> dict[str, Path]:
    """Returns the side files of a checkpoint (:data:`SIDE_FILES`), by path relative to its directory."""
    return matching(directory, SIDE_FILES)


def copy_side_files(source: Path, target: Path) -> None:
    """Copies the side files of the checkpoint ``source`` to the directory ``target``."""
    for name, path in find_side_files(source).items():
        copy = target / name
        if path.resolve() != copy.resolve():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def joined_side_files(first: Path, other: Path) -> dict[str, Path]:
    """Returns the side files of two checkpoints, by path relative to their directory.

    If ``first`` has files of a group (:data:`SIDE_GROUPS`), the group is from ``first``, else from ``other``.
    """
    found: dict[str, Path] = {}
    for group in SIDE_GROUPS:
        found |= matching(first, group) or matching(other, group)
    return found


def local_checkpoint(checkpoint: str | Path) -> Path | None:
    """Returns a checkpoint's directory, or the file if it is a ``.pth`` of LAVIS; None for a hub name. Needs no torch.

    Raises:
        CheckpointError: ``checkpoint`` is neither on this machine nor a hub name.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if is_lavis(path):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file", "give a .pth that LAVIS wrote")
        return path
    return _named_checkpoint(path, str(checkpoint))


def is_lavis(path: Path) -> bool:
    """Whether a path is that of a ``.pth`` of LAVIS, by its suffix."""
    return path.suffix in (".pth", ".pt") and not path.is_dir()


def _named_checkpoint(path: Path, name: str) -> Path | None:
    """Returns a checkpoint's directory; None for a hub name.

    Raises:
        CheckpointError: It is neither a directory nor a hub name.
    """
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is a file, but a checkpoint is a directory with config.json and *.safetensors",
            "give the directory that holds it",
        )
    if not is_hub_name(name) and (name.partition("@")[0].count("/") != 1 or name.startswith((".", "/", "~"))):
        raise CheckpointError(
            f"there is no directory {name}", "give a checkpoint directory, or a hub name as owner/name"
        )
    return None


def find_checkpoint(checkpoint: str | Path) -> Path:
    """Returns a checkpoint's directory; a hub name (``ORG/NAME[@REVISION]``) is downloaded into the hub's cache.

    Raises:
        CheckpointError: ``checkpoint`` is neither a directory nor a hub name, or cannot be downloaded.
        OutputError: The disk is full.
    """
    name = str(checkpoint)
    found = _named_checkpoint(Path(checkpoint), name)
    if found is not None:
        return found
    parsed = HubName.parse(name)
    hub = hub_client(name)
    what = f"{name} is no local directory and could not be fetched from the hub"
    with hub_errors(what, parsed, CheckpointError, Path(hub.constants.HF_HUB_CACHE)), transfer_progress() as report:
        return _snapshot(parsed, _bars(report, f"downloading {name}"))


def cached_checkpoint(name: str) -> Path | None:
    """Returns the directory of a hub name in the hub's cache; None if it is not in the cache. Nothing is downloaded."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(HubName.parse(name), None, local_files_only=True)
    except (UsageError, HFValidationError, LocalEntryNotFoundError):
        return None


def _bars(report: ProgressCallback, what: str) -> type:
    """Makes a class for the progress bars of the hub's client; its bars draw nothing, but report the downloaded bytes.

    Args:
        report: Function that is called with a name, the downloaded MB, and the MB of all files found so far.
        what: What is downloaded.
    """
    tqdm: Any = import_module("huggingface_hub.utils").tqdm

    class Reported(tqdm):  # type: ignore[misc]
        """A progress bar of the hub's client that draws nothing, but reports the downloaded bytes."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts_bytes = options.get("name") == "huggingface_hub.snapshot_download"
            self.bytes = int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            """Reports ``n`` more downloaded bytes; the threads that download call this method."""
            if self.counts_bytes and self.total:
                self.bytes += int(n or 0)
                # The total grows while the files are found, so the unit is always MB.
                report(f"{what}, MB", self.bytes // MB, max(-(-int(self.total) // MB), 1))

    return Reported


def _snapshot(name: HubName, bars: type | None, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*CHECKPOINT_FILES, MANIFEST]  # the last: so that the error can name a bundle
    ignored = ["*/*.safetensors", "*/adapter_model.bin"]
    return Path(
        snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=patterns,
            ignore_patterns=ignored,
            local_files_only=local_files_only,
            tqdm_class=bars,
        )
    )


def read_checkpoint_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: The file is missing, unreadable, not JSON, or not an object.
    """
    missing = CheckpointError(
        f"{path.parent} has no {path.name}", "give a directory written by transformers' save_pretrained"
    )
    return reading.read_json(path, CheckpointError, "copy the checkpoint again", missing=missing)
