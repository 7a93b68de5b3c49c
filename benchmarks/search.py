"""Measures the search for combinations of number formats (``calibrate --search``) on two captioners.

    python benchmarks/search.py miniature
    python benchmarks/search.py smollm2 --bundle BUNDLE     the bundle of benchmarks/smollm2_captioner.py

The miniature is the example checkpoint, on scenes of the training split. The SmolLM2 captioner has a random vision
encoder, so its captions have no meaning, but the language model is real. A killed run goes on when it is started again.
The result has the Pareto front (combinations of formats that no other combination beats), the combinations that
``calibrate`` makes without a search (measured in the same run), and the CPU minutes on one thread.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import CHECKPOINT, RESULTS, bundle_path, command, machine, parser_of, system, write_json

from blip2edge.calibration.search.front import FormatPoint, FoundPoints
from blip2edge.calibration.search.pipeline import search
from blip2edge.calibration.search.points import MEASURED, SCORED, SearchOptions
from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.optimization.pipeline import optimize
from blip2edge.progress import Progress
from blip2edge.training.data.scenes import scenes

CALIBRATION_SEED = 4242


def draw_scenes(folder: Path, count: int) -> None:
    """Writes pictures of scenes of the training split as files."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for index, scene in enumerate(scenes(count, split="train", seed=CALIBRATION_SEED)):
            scene.picture.save(folder / f"{index:04d}.png")


def optimize_graphs(bundle: Path, graphs: Sequence[str]) -> None:
    """Makes the optimized copies of some graphs."""
    optimize(bundle, "cpu", graphs=graphs)


def row(point: FormatPoint, front: Sequence[FormatPoint]) -> dict[str, Any]:
    """Returns the result row of one measured combination.

    The row has the flags of all combinations on the Pareto front that are better than this combination.
    """
    beaten = [other.flags for other in front if other.beats(point)]
    return {**point.to_json(), "on_the_front": point in front, "beaten_by": beaten}


def rows(found: FoundPoints) -> dict[str, Any]:
    """Returns the results of a search: the combinations on the Pareto front, and the presets, which need no search.

    Also returns how often a preset is better than a combination on the front.
    """
    measured = [point for point in found.points if point.drop is not None]
    presets = [point for point in measured if point.preset]
    return {
        "combinations": len(found.points),
        "measured": len(measured),
        "front": [row(point, found.front) for point in found.front],
        "presets": [row(point, found.front) for point in presets],
        "points_of_the_front_beaten_by_presets": sum(
            preset.beats(point) for point in found.front for preset in presets
        ),
        "chosen_by_default": {"flags": found.chosen.point.flags, "rule": found.chosen.rule},
        "cpu_minutes": round(found.cpu_s / 60, 2),
    }


def main() -> None:
    """Runs the search, prints the Pareto front, and writes the results as JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("model", choices=("miniature", "smollm2"))
    parser.add_argument(
        "--bundle", type=bundle_path, help="an exported bundle in fp32 (default: export the example checkpoint)"
    )
    parser.add_argument("--pictures", type=int, default=128, help="number of calibration pictures (128)")
    parser.add_argument(
        "--formats", nargs="+", default=[], help="number formats to try (default: all); mixed: two formats in a graph"
    )
    parser.add_argument(
        "--measured", type=int, default=MEASURED, help=f"number of combinations to measure ({MEASURED})"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder for pictures, state and result; a killed run continues from it"
    )
    options = parser.parse_args()
    if options.model == "smollm2" and options.bundle is None:
        parser.error("give the exported captioner with --bundle")
    folder = options.folder or Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    draw_scenes(folder / "pictures", options.pictures)
    bundle = options.bundle or folder / "bundle"
    if not bundle.exists():
        export_checkpoint(CHECKPOINT, bundle)
    start = time.perf_counter()
    wanted = SearchOptions(measured=options.measured, formats=tuple(options.formats))
    with Progress() as progress:
        _, found = search(
            bundle, folder / "out", images=folder / "pictures", options=wanted, optimizer=optimize_graphs, threads=1,
            force=True, progress=progress, notify=print,
        )  # fmt: skip
    document = {
        "command": command(),
        "machine": machine() | system("onnx", "onnxruntime", "numpy"),
        "pictures": options.pictures,
        "scored_pictures": SCORED,
        "formats": options.formats or "all",
        **rows(found),
        "wall_minutes_of_the_last_run": round((time.perf_counter() - start) / 60, 2),
    }
    write_json(RESULTS / f"search-{options.model}.json", document)
    for point in found.front:
        print(f"{point.drop:5.1f} {point.nats:9.2g} {point.ms:8.2f} ms {point.bytes / 1e6:8.2f} MB  {point.flags}")
    print(f"{len(found.front)} points on the front, {found.cpu_s / 60:.1f} CPU minutes")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main)
