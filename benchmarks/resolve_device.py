"""Checks that all packages of the device extras have wheels for the device (64-bit Arm).

    .venv310/bin/python benchmarks/resolve_device.py

pip resolves the runtime with each extra, with the versions of ``constraints.txt``, for 64-bit Arm and the Python that
runs this script; nothing is installed. Run it with Python 3.10 for JetPack 6 (`make resolve`), with 3.12 for JetPack 7:
pip evaluates markers for the running interpreter. Needs a network.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from blip2edge.cli import run_script

ROOT = Path(__file__).resolve().parents[1]
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
EXTRAS = ("", "cpu", "serve", "tls", "video", "hub", "build", "sign", "mqtt", "bulk")
"""Extras that a device may need; the empty text is the runtime alone. CUDA and TensorRT come from JetPack."""


def requirements(extra: str) -> list[str]:
    """Returns the requirements of the runtime and of one extra."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]


def resolve(extra: str) -> dict[str, str]:
    """Returns the version of each package that pip would install on the device.

    Raises:
        SystemExit: A package has no wheel for the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["install", "--dry-run", "--quiet", "--ignore-installed", "--target", folder, "--report", str(report)]
        words += ["--only-binary=:all:", "--implementation", "cp", "--python-version", platform.python_version()]
        words += [word for name in PLATFORMS for word in ("--platform", name)]
        words += ["-c", str(ROOT / "constraints.txt"), *requirements(extra)]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
        if done.returncode:
            problem = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            raise SystemExit("\n".join([f"{extra or 'the runtime'}: pip finds no versions for this device", *problem]))
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
        foreign = [one["download_info"]["url"] for one in found if "x86_64" in one["download_info"]["url"]]
        if foreign:
            raise SystemExit(f"{extra}: not for this device: {', '.join(foreign)}")
        return {one["metadata"]["name"]: one["metadata"]["version"] for one in found}


def main() -> None:
    """Resolves each extra and prints its packages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for extra in EXTRAS:
        found = resolve(extra)
        print(f"{extra or 'runtime':<8} {', '.join(f'{name} {version}' for name, version in sorted(found.items()))}")


if __name__ == "__main__":
    run_script(main)
