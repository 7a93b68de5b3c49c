"""Prepares files for ``gpu.py``, on a machine without a GPU: they save time on the machine with the GPU.

    python benchmarks/gpu_prepare.py --sm 90        # writes build/gpu-bundles, build/gpu-true-size, build/gpu-kernels

``bundles`` has the bundles of the example checkpoint. ``true-size`` has the graphs of a model of published size,
without the weights; to make it takes minutes and tens of gigabytes of disk. ``kernels`` has compiled kernels; to
make it needs NVRTC (extra `cuda-decoder`). Copy the folders, with the repository, to the machine with the GPU. If a
folder is missing there, the steps of ``gpu.py`` make its files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import gpu_kernels
from gpu_bundles import make_bundles
from gpu_common import BUNDLES, KERNELS, TRUE_SIZE
from gpu_true_size import make_packed
from reporting import parser_of

from blip2edge.cli import run_script

FOLDERS = {"bundles": BUNDLES, "true-size": TRUE_SIZE, "kernels": KERNELS}


def main() -> None:
    """Makes the folders, and prints their sizes."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=FOLDERS, default=list(FOLDERS), help="folders (default: all)")
    parser.add_argument("--sm", type=int, nargs="+", help="kinds of GPU for the kernels, such as 90 (default: all)")
    options = parser.parse_args()
    for name in options.only:
        folder = FOLDERS[name]
        shutil.rmtree(folder, ignore_errors=True)
        if name == "bundles":
            make_bundles(folder)
        elif name == "true-size":
            make_packed(folder / "packed")
        else:
            gpu_kernels.prepare(folder, options.sm)
        print(f"{folder}: {_size(folder) / 1e6:.1f} MB", flush=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    run_script(main)
