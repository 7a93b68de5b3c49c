"""Compares the throughput of `bulk` with a loop over one loaded `Captioner`: same pictures, same number of threads.

    python benchmarks/bulk_speed.py BUNDLE --json benchmarks/results/bulk-speed.json

The pictures are generated JPEGs of the size of photos (640 x 480, noise of a camera), so that reading and decoding them
takes as long as for photos. The loop calls `Captioner.caption` picture by picture. `bulk` and the loop are measured in
turn in one process (A B A B), by wall time; the load of the machine is in the result. The time of `bulk` includes
loading the bundle, listing the pictures and writing the output. The loop's bundle is loaded before its time begins.
Other rows: `bulk` with one thread for the pictures, `bulk` with batches of one picture, and only decoding the pictures,
by threads and by processes.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from reporting import bundle_path, parser_of, write_result

from blip2edge.bulk.options import BulkOptions
from blip2edge.bulk.pipeline import Output, run_bulk
from blip2edge.bulk.sources import PictureSource
from blip2edge.bundle.bundle import Bundle
from blip2edge.cli import run_script
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.training.data.scenes import scenes


def draw(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Writes generated pictures as JPEG files; returns their paths."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(-12, 13, (size[1], size[0], 3), np.int16)
    paths = []
    for number, scene in enumerate(scenes(count, split="heldout")):
        large = np.asarray(scene.picture.resize(size, Image.Resampling.BICUBIC), np.int16)
        content = io.BytesIO()
        Image.fromarray(np.clip(large + np.roll(noise, number, 0), 0, 255).astype(np.uint8)).save(
            content, "JPEG", quality=90
        )
        paths.append(folder / f"{number:06d}.jpg")
        paths[-1].write_bytes(content.getvalue())
    return paths


def decode(preprocessing: Preprocessing, path: Path) -> None:
    """Reads, decodes and preprocesses one picture."""
    preprocessing(str(path))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480))
    parser.add_argument(
        "--least", type=float, default=1.3, help="fail if the speed of bulk, divided by that of the loop, is below this"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    preprocessing = Preprocessing.from_json(Bundle.open(arguments.bundle).manifest.preprocessing)
    with (
        tempfile.TemporaryDirectory() as name,
        Captioner.load(arguments.bundle, threads=arguments.threads) as captioner,
    ):
        root = Path(name)
        paths = draw(root / "pictures", arguments.pictures, tuple(arguments.size))

        def loop() -> list[str]:
            return [captioner.caption(path).text for path in paths]

        def bulk(batch_size: int, workers: int) -> list[str]:
            out = root / "out"
            shutil.rmtree(out, ignore_errors=True)
            options = BulkOptions(
                arguments.bundle, threads=arguments.threads, batch_size=batch_size, workers=workers, chunk_size=200
            )
            run_bulk(PictureSource(str(root / "pictures")), Output.named(out, "parquet", False), options)
            import pyarrow.parquet

            return [text for (text,) in pyarrow.parquet.read_table(out)["captions"].to_pylist()]

        def decoding(pool: Executor) -> None:
            list(pool.map(partial(decode, preprocessing), paths, chunksize=8))

        with ThreadPoolExecutor(arguments.threads) as threads, ProcessPoolExecutor(arguments.threads) as processes:
            calls: dict[str, Callable[[], list[str] | None]] = {
                "loop": loop,
                "bulk": partial(bulk, 16, arguments.threads),
                "bulk, one thread for pictures": partial(bulk, 16, 1),
                "bulk, batches of one": partial(bulk, 1, arguments.threads),
                "decoding, threads": partial(decoding, threads),
                "decoding, processes": partial(decoding, processes),
            }
            seconds: dict[str, list[float]] = {key: [] for key in calls}
            texts: dict[str, list[str] | None] = {}
            for number in range(arguments.rounds + 1):
                for key, call in calls.items():
                    start = time.perf_counter()
                    texts[key] = call()
                    if number:
                        seconds[key].append(time.perf_counter() - start)
                print(number, {key: round(values[-1], 2) for key, values in seconds.items() if values}, flush=True)
    rows = {
        key: {
            "pictures_per_s": round(arguments.pictures / statistics.median(values), 1),
            "times_loop": round(statistics.median(a / b for a, b in zip(seconds["loop"], values, strict=True)), 2),
            "seconds": [round(value, 2) for value in values],
        }
        for key, values in seconds.items()
    }
    same = sum(a == b for a, b in zip(texts["loop"] or [], texts["bulk"] or [], strict=True))
    write_result(arguments.json, load=os.getloadavg(), pictures=arguments.pictures, equal_texts=same, rows=rows)
    for key, row in rows.items():
        print(f"{key}: {row['pictures_per_s']} pictures/s, {row['times_loop']} x the loop")
    print(f"{same} of {arguments.pictures} captions are equal; load {os.getloadavg()}")
    return 0 if rows["bulk"]["times_loop"] >= arguments.least else 1


if __name__ == "__main__":
    run_script(main)
