"""Which kind of data a path is, so that a command needs no configuration for it."""

from __future__ import annotations

from pathlib import Path

from blip2edge.errors import ConfigError, DataError, UsageError
from blip2edge.training.data.coco import load_json_object
from blip2edge.training.data.config import DataConfig
from blip2edge.training.fields import read_section

_EXPECTED = (
    "COCO's JSON of captions or of VQA questions, a folder of pictures with texts, tar shards, or a recipe's section"
    " [data]"
)


def detect_data(
    path: str, images: str | None, annotations: str | None, max_broken: int
) -> tuple[DataConfig, Path]:
    """What a path holds.

    Args:
        path: A JSON file, a folder, shards (a tar file, a pattern, a directory of them), or a recipe (TOML).
        images: The directory of a JSON file's pictures; None: beside the file.
        annotations: The answers to VQA's questions; None: the file beside it.
        max_broken: How many samples may be broken; of a recipe its own key counts.

    Returns:
        The configuration, and the directory that its paths are relative to.

    Raises:
        DataError: It is none of these.
        ConfigError: A recipe with a wrong section [data].
    """
    place = Path(path)
    if place.suffix == ".toml":
        return _of_recipe(place), place.parent
    if place.suffix == ".json":
        kind = "coco-vqa" if "questions" in load_json_object(place) else "coco-captions"
    elif place.is_dir():
        kind = "shards" if any(place.glob("*.tar")) else "folder"
    elif place.suffix == ".tar":
        kind = "shards"
    else:
        raise DataError(f"expected {_EXPECTED}, got {path}", "check the path")
    here = Path.cwd()
    return (
        DataConfig(
            kind=kind,
            path=str(place.absolute()),
            images=str(Path(images).absolute()) if images else "",
            annotations=str(Path(annotations).absolute()) if annotations else "",
            max_broken=max_broken,
        ),
        here,
    )


def _of_recipe(path: Path) -> DataConfig:
    """The section [data] of a recipe; its other sections are not looked at."""
    try:
        import tomllib
    except ModuleNotFoundError as error:  # Python 3.10, where bundles run
        raise UsageError(f"reading {path.name} needs Python 3.11", "name the data itself") from error
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: expected TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    section = content.get("data")
    if not isinstance(section, dict):
        raise DataError(f"{path} has no section [data]")
    return read_section("data", DataConfig, section)
