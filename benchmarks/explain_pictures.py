"""Makes the pictures and the numbers of docs/explain.md: exports the example checkpoint, and explains its captions.

    python benchmarks/explain_pictures.py --write | --check

The pictures are docs/explain.png (the heat maps of one layer for one picture) and docs/explain-queries.png (the cosines
of the queries). ``--check`` allows small differences, because other machines round differently.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops
from reporting import CHECKPOINT, ROOT, parser_of

from blip2edge.cli import run_script
from blip2edge.cli.explain import summary
from blip2edge.explanation.pipeline import MATRIX, explain
from blip2edge.export.pipeline import export_checkpoint

PAGE = ROOT / "docs" / "explain.md"
BLOCK = re.compile(r"(<!-- figures: made by [^\n]*\n).*?(<!-- end of figures -->)", re.DOTALL)
SCENE, LAYER = 0, -1  # the picture and the layer that the page shows
TOLERANCE = 2.0  # mean difference of a colour, of 255


def made(directory: Path, bundle: Path | None = None) -> tuple[dict[Path, Image.Image], str]:
    """Makes the pictures and the page. Returns the pictures by their path in docs/, and the page with its numbers.

    Args:
        directory: An empty directory for the files of the run.
        bundle: Bundle of the example checkpoint; None to export the checkpoint.
    """
    if bundle is None:
        bundle = export_checkpoint(CHECKPOINT, directory / "bundle").bundle
    scenes = sorted((ROOT / "examples" / "pictures").glob("*.png"))
    report = explain(scenes, bundle, directory / "out", threads=1)
    files = {"explain.png": report.document["pictures"][SCENE]["layers"][LAYER]["file"], "explain-queries.png": MATRIX}
    pictures = {ROOT / "docs" / name: Image.open(directory / "out" / file).copy() for name, file in files.items()}
    table = summary(report.document, Path("out/explain.html"))
    return pictures, BLOCK.sub(rf"\g<1>\n```\n{table}\n```\n\n\g<2>", PAGE.read_text(encoding="utf-8"))


def difference(one: Image.Image, other: Image.Image) -> float:
    """Returns the mean difference of the pixel values of two pictures (0 to 255); 255 if their sizes differ."""
    if one.size != other.size:
        return 255.0
    return float(np.asarray(ImageChops.difference(one.convert("RGB"), other.convert("RGB"))).mean())


def main() -> None:
    """Writes docs/explain.md and its pictures, or compares them with the existing files."""
    parser = parser_of(__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--write", action="store_true", help="write the pictures and the numbers of the page")
    how.add_argument("--check", action="store_true", help="exit 1 unless pictures and numbers are up to date")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        pictures, page = made(Path(directory))
    for path, picture in pictures.items():
        if options.write:
            picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        elif not path.exists() or difference(Image.open(path), picture) > TOLERANCE:
            sys.exit(f"{path.relative_to(ROOT)} is not what this script draws; run: make docs")
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page:
        sys.exit("docs/explain.md has other figures; run: make docs")


if __name__ == "__main__":
    run_script(main)
