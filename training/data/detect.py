"""Detects the kind of data at a path, so that a command can read the data without a recipe."""

from __future__ import annotations

from pathlib import Path

from blip2edge.errors import ConfigError, DataError, UsageError
from blip2edge.picture_files import is_address
from blip2edge.reading import read_text, reading
from blip2edge.special_files import open_file
from blip2edge.training.data.coco import load_json_object
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.readers.tables import METADATA, ROWS_BY_SUFFIX
from blip2edge.training.data.registry import SHARD_FORMATS
from blip2edge.training.fields import read_section

_EXPECTED = (
    "COCO's JSON of captions or of VQA questions, Karpathy's splits, a table (a JSON list, .jsonl, .csv, .tsv), a"
    " folder of pictures with texts, tar shards, Parquet files, or a recipe's section [data]"
)
_HEAD, _BLANK = 1024, b" \r\n\t\xef\xbb\xbf"  # bytes of a JSON file that show whether it holds a list
_EVALUATED = ("test",)  # the split of Karpathy's file that is scored in the literature


def detect_data(path: str, images: str | None, annotations: str | None, max_broken: int) -> tuple[DataConfig, Path]:
    """Detects the kind of data at a path; returns a section `[data]` that describes the data.

    Args:
        path: A JSON file, a table, a folder of pictures, a shard or Parquet file (its path or address, or a directory
            of such files), or a recipe (TOML).
        images: Directory of a JSON file's pictures; None for the directory of the file.
        annotations: File of the answers to VQA's questions; None for the file in the directory of the questions.
        max_broken: Largest number of broken samples; a recipe's own value overrides it.

    Returns:
        The section `[data]`, and the directory that its relative paths start from.

    Raises:
        DataError: The kind is not known.
        ConfigError: The section [data] of the recipe is wrong.
    """
    place = Path(path)
    if place.suffix == ".toml":
        return _of_recipe(place), place.parent
    kind = _kind_of_folder(place) if place.is_dir() else _kind_of_file(path)
    if kind is None and not is_address(path) and not place.exists() and not set("*?[{") & set(path):
        raise DataError(f"there is no file or folder {path}", "check the path")
    if kind is None:
        raise DataError(f"expected {_EXPECTED}, got {path}", "check the path")
    here = Path.cwd()
    return (
        DataConfig(
            kind=kind,
            path=path if is_address(path) else str(place.absolute()),
            images=str(Path(images).absolute()) if images else "",
            annotations=str(Path(annotations).absolute()) if annotations else "",
            max_broken=max_broken,
            splits=_EVALUATED,
        ),
        here,
    )


def _kind_of_file(path: str) -> str | None:
    """Returns the kind of data, by the name of a file or address, or by the content of a JSON file; None if unknown."""
    if path.endswith(".json"):
        return _kind_of_json(Path(path))
    name = path.lower()
    if Path(name).suffix in ROWS_BY_SUFFIX.keys() - {".json", ".parquet"}:
        return "table"
    return next((kind for kind, form in SHARD_FORMATS.items() if name.endswith(form.suffixes)), None)


def _kind_of_json(path: Path) -> str:
    with reading(path, "JSON", DataError), open_file(path) as file:
        if file.read(_HEAD).lstrip(_BLANK).startswith(b"["):
            return "table"
    content = load_json_object(path)
    if "questions" in content:
        return "coco-vqa"
    images = content.get("images")
    first = images[0] if isinstance(images, list) and images else None
    return "karpathy" if isinstance(first, dict) and "sentences" in first else "coco-captions"


def _kind_of_folder(folder: Path) -> str:
    names = [path.name.lower() for path in folder.iterdir()]
    if any(name in names for name in METADATA):
        return "table"
    found = (kind for kind, form in SHARD_FORMATS.items() if any(name.endswith(form.suffixes) for name in names))
    return next(found, "folder")


def _of_recipe(path: Path) -> DataConfig:
    """Reads the section `[data]` of a recipe file; ignores the other sections."""
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
    if isinstance(section, list):
        raise UsageError(
            f"expected one data set, got the {len(section)} of [[data]] in {path.name}",
            "give the path of one of the data sets",
        )
    if not isinstance(section, dict):
        raise DataError(f"{path} has no section [data]", "add [data] with the keys kind and path")
    return read_section("data", DataConfig, section)
