"""Measures the CPU time of reading training data in each format.

For shards and Parquet files, also measures the CPU time of one process that reads only its share of the files, as each
of several processes does with the recipe key ``data_streams``.

python benchmarks/data_reading.py --json benchmarks/results/data-reading.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from blip2edge.cli import run_script
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.registry import open_sample_source
from blip2edge.training.data.shards import ShardWriter

SAMPLES, FILES, PROCESSES = 8000, 16, 8


def write(folder: Path) -> None:
    """Writes the same samples as shards, Parquet, JSONL and CSV; each picture is a JPEG of 64 x 64 pixels."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(32):
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        pictures.append(file.getvalue())
    writer = ShardWriter(folder / "shards", SAMPLES // FILES)
    rows = []
    (folder / "parquet").mkdir()
    (folder / "picture.jpg").write_bytes(pictures[0])
    for number in range(SAMPLES):
        picture, caption = pictures[number % len(pictures)], f"a caption of the picture {number}"
        writer.add(f"{number:06d}", picture, ".jpg", [caption], {"key": number})
        rows.append({"jpg": picture, "caption": caption})
    writer.close()
    for number in range(FILES):
        parquet.write_table(
            pyarrow.Table.from_pylist(rows[number::FILES]), folder / "parquet" / f"{number:03d}.parquet"
        )
    captions = [row["caption"] for row in rows]
    lines = [json.dumps({"image": "picture.jpg", "caption": caption}) for caption in captions]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "rows.csv").write_text("image,caption\n" + "".join(f"picture.jpg,{caption}\n" for caption in captions))


def seconds(folder: Path, kind: str, path: str, count: int, part: tuple[int, int] = (0, 1)) -> float:
    """Returns the CPU seconds in which `count` samples are read (pictures are not decoded); the least of three runs."""
    config, found = DataConfig(kind=kind, path=path), []
    for _ in range(3):
        start = time.process_time()
        drawn = sum(1 for _ in islice(open_sample_source(config, seed=0, base=folder, part=part), count))
        found.append(time.process_time() - start)
        assert drawn == count
    return min(found)


def main() -> None:
    """Measures all formats, prints the times, and writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the times to FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        folder = Path(place)
        write(folder)
        paths = {"shards": "shards", "parquet": "parquet", "jsonl": "rows.jsonl", "csv": "rows.csv"}
        kinds = {"jsonl": "table", "csv": "table"}
        rates = {
            name: round(SAMPLES / seconds(folder, kinds.get(name, name), path, SAMPLES)) for name, path in paths.items()
        }
        one = {kind: seconds(folder, kind, kind, SAMPLES) for kind in ("shards", "parquet")}
        own = {kind: seconds(folder, kind, kind, SAMPLES // PROCESSES, (0, PROCESSES)) for kind in one}
    figures = {
        "samples": SAMPLES,
        "files": FILES,
        "samples_per_cpu_second": rates,
        "processes": PROCESSES,
        "cpu_seconds_of_a_process": {
            kind: {"data_streams_1": round(one[kind], 3), f"data_streams_{PROCESSES}": round(own[kind], 3)}
            for kind in one
        },
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
