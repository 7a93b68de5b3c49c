"""Detects the kind of data at a path, so that a command needs no recipe."""

from __future__ import annotations

from pathlib import Path

from blip2edge.errors import ConfigError, DataError, UsageError
from blip2edge.reading import read_text, reading
from blip2edge.training.data.coco import load_json_object
from blip2edge.training.data.config import DataConfig
from blip2edge.training.fields import read_section

_EXPECTED = (
    "COCO's JSON of captions or of VQA questions, a folder of pictures with texts, tar shards, or a recipe's section"
    " [data]"
)


def detect_data(path: str, images: str | None, annotations: str | None, max_broken: int) -> tuple[DataConfig, Path]:
    """Detects the kind of data at a path.

    Args:
        path: A JSON file, a folder, shards (a tar file, a pattern, a directory of them), or a recipe (TOML).
        images: Directory of a JSON file's pictures; None for the directory of the file.
        annotations: File of the answers to VQA's questions; None for the file in the directory of the questions.
        max_broken: Largest number of broken samples; a recipe's own value overrides it.

    Returns:
        The configuration, and the directory that its paths are relative to.

    Raises:
        DataError: The kind is not known.
        ConfigError: The section [data] of the recipe is wrong.
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
    """Reads the section [data] of a recipe; other sections are ignored."""
    try:
        import tomllib
    except ModuleNotFoundError as error:  # Python 3.10, where bundles run
        raise UsageError(
            f"reading the recipe {path.name} needs Python 3.11 or newer",
            "give the path of the data instead of a recipe",
        ) from error
    text = read_text(path, DataError)
    with reading(path, "TOML", ConfigError, None):
        content = tomllib.loads(text)
    section = content.get("data")
    if not isinstance(section, dict):
        raise DataError(f"{path} has no section [data]", "add [data] with the keys kind and path")
    return read_section("data", DataConfig, section)
