"""Directories are written beside their place and renamed when every check has passed."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blip2edge.bundle.manifest import MANIFEST
from blip2edge.errors import OutputError, option


@contextmanager
def staged(target: Path, force: bool, marker: str = MANIFEST) -> Iterator[Path]:
    """A sibling of ``target`` that takes its place when the block ends well, and vanishes when it does not.

    Args:
        target: The directory: a bundle's, unless ``marker`` says otherwise.
        force: Whether one that is there is replaced.
        marker: The file by which one of the kind is known.

    Raises:
        OutputError: ``target`` exists, holds other files, or cannot be written.
    """
    if (target.exists() or target.is_symlink()) and not force:
        raise OutputError(
            f"{target} exists",
            f"give another output directory, or replace it with {option('force', on=True)}",
        )
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file, and a directory is written", "give another output directory")
    if target.exists() and not (target / marker).is_file() and any(target.iterdir()):
        raise OutputError(
            f"{target} holds files and no {marker}, so {option('force', on=True)} does not replace it",
            "give another output directory",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise output_error(target, error) from error
    try:
        staging.chmod(0o755)
        yield staging
        _publish(staging, target)
    except OSError as error:
        raise output_error(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)) / "replaced"
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:  # Ctrl-C too: what was there comes back
        old.rename(target)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def output_error(path: Path, error: OSError) -> OutputError:
    """An operating system's refusal to write, in one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full: {path} could not be written", "free space, or give another -o")
    return OutputError(
        f"{path} could not be written ({error.strerror or error})", "check the path and its permissions"
    )
