"""Which pictures a calibration sees: a folder, ``.tar`` shards, or both, in an order that never changes."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blip2edge.errors import DataError, ImageError, option
from blip2edge.progress import counted
from blip2edge.runtime.images.preprocess import PICTURE_SUFFIXES, load_image

SHARD = ".tar"
ADVISED = 100
"""Pictures below which ranges are uncertain: with fewer, a warning tells the number."""

DEFAULT_COUNT = 512
"""At most so many are used unless told otherwise; SmoothQuant (arXiv 2211.10438) calibrates on 512 samples."""


@dataclass(frozen=True)
class Picture:
    """A picture in a file, or in a shard.

    Attributes:
        path: The file, or the shard.
        member: Its name in the shard; empty for a file.
        offset: Where it begins in the shard, in bytes.
        size: Bytes in the shard.
    """

    path: Path
    member: str = ""
    offset: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        """What a message calls it."""
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def references(self) -> list[str]:
        """Captions that people wrote: the lines of a ``.txt`` of the same name beside the file; none in a shard."""
        beside = self.path.with_suffix(".txt")
        if self.member or not beside.is_file():
            return []
        lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def read(self) -> bytes:
        """The bytes of the picture file."""
        if not self.member:
            return self.path.read_bytes()
        with self.path.open("rb") as shard:
            shard.seek(self.offset)
            return shard.read(self.size)


@dataclass(frozen=True)
class PictureSet:
    """The pictures that were chosen.

    Attributes:
        pictures: In order.
        found: How many there were to choose from.
        sha256: One hash over their bytes, in order.
        skipped: Names of those that could not be read as pictures.
    """

    pictures: tuple[Picture, ...]
    found: int
    sha256: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.pictures)


def choose_pictures(
    source: str | Path, count: int = DEFAULT_COUNT, progress: Callable[[int, int], None] | None = None
) -> PictureSet:
    """Finds pictures and takes ``count`` of them, at equal distances in the order of their names.

    Args:
        source: A folder (searched with its subfolders) of picture files and ``.tar`` shards as WebDataset writes
            them, or one shard.
        count: How many at most.
        progress: Called with pictures read and pictures in all.

    Raises:
        DataError: There is no picture that can be read.
    """
    root = Path(source)
    found = list(_search(root))
    if not found:
        raise DataError(
            f"{root}: expected pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) or .tar shards of them, found none",
            f"give {option('images')} a folder with pictures of the kind that the device will see",
        )
    wanted = found if len(found) <= count else [found[at * len(found) // count] for at in range(count)]
    digest, kept, skipped = hashlib.sha256(), [], []
    for picture in counted(wanted, len(wanted), progress):
        content = picture.read()
        try:
            load_image(content)
        except ImageError:
            skipped.append(picture.name)
            continue
        digest.update(hashlib.sha256(content).digest())
        kept.append(picture)
    if not kept:
        raise DataError(
            f"{root}: none of the {len(wanted)} pictures can be read, {skipped[0]} among them",
            f"give {option('images')} a folder with whole pictures",
        )
    return PictureSet(tuple(kept), len(found), digest.hexdigest(), tuple(skipped))


def _search(root: Path) -> Iterator[Picture]:
    if root.is_file() and root.suffix.lower() == SHARD:
        yield from _shard(root)
        return
    if not root.is_dir():
        raise DataError(
            f"{root}: expected a folder of pictures or a .tar shard, and there is none",
            f"give {option('images')} a folder that exists",
        )
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.is_file():
            continue
        if path.suffix.lower() == SHARD:
            yield from _shard(path)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            yield Picture(path)


def _shard(path: Path) -> Sequence[Picture]:
    """The pictures of a tar file, by name; only its headers are read."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = [
                Picture(path, member.name, member.offset_data, member.size)
                for member in archive
                if member.isfile() and Path(member.name).suffix.lower() in PICTURE_SUFFIXES
            ]
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as an uncompressed tar file ({error})", "copy the shard again"
        ) from error
    return sorted(members, key=lambda picture: picture.member)
