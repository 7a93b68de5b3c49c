"""Kills `bulk` again and again, and compares the output with that of a run that is not killed, byte by byte.

    python benchmarks/bulk_kills.py BUNDLE --json benchmarks/results/bulk-kills.json

5,000 generated pictures (1 % broken, 2 % copies of others) are captioned to three outputs: a Parquet file; a directory
of WebDataset shards, with a search for duplicates; and a file that replaces another one (`--force`). For each way of
killing, each output is made twice: once without a kill, and once by a run that is killed (SIGKILL) every few seconds
and started again by the same call until the output is complete. The ways of killing (`tests/faults.py`): at a random
moment, just before a file is changed, and just after a file was changed. Expected: the bytes are equal, no picture is
missing, no picture is there twice, and no other file is left beside the output.

Exit status 1 if one of the expectations is not met.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image
from reporting import bundle_path, parser_of, write_result

from blip2edge.bulk.options import BulkOptions
from blip2edge.bulk.pipeline import Output, run_bulk
from blip2edge.bulk.sinks import sink_of
from blip2edge.bulk.sources import PictureSource
from blip2edge.cli import run_script
from blip2edge.training.data.scenes import scenes
from tests.faults import WAYS, Killer

BROKEN_EVERY, COPY_EVERY = 100, 50


@dataclass(frozen=True)
class Case:
    """An output of ``bulk``, and the options with which it is made.

    Attributes:
        name: File name of the output.
        captions: Number of captions of each picture.
        generation: Options of the generation.
        duplicates: Smallest cosine similarity of a duplicate and its original. If None, duplicates are not searched.
        force: Whether the output replaces (``--force``) an earlier output, which has one picture.
    """

    name: str
    captions: int
    generation: dict[str, Any]
    duplicates: float | None
    force: bool = False


CASES = (
    Case("captions.parquet", 2, {"num_beams": 3}, None),
    Case("shards", 1, {"temperature": 0.7, "seed": 3}, 0.995),
    Case("replaced.parquet", 1, {}, None, force=True),
)


def draw(folder: Path, count: int) -> None:
    """Writes the pictures; some are broken, some are copies of the previous picture, in another format."""
    last = Image.new("RGB", (64, 64))
    for number, scene in enumerate(scenes(count, seed=9)):
        path = folder / f"{number // 500:03d}" / f"{number:06d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        copied = number % COPY_EVERY == COPY_EVERY - 1
        last = last if copied else scene.picture
        last.save(content, "JPEG" if copied else "PNG", quality=95)
        value = content.getvalue()
        if number % BROKEN_EVERY == 7:
            value = (b"", b"no picture", value[: len(value) // 2])[number // BROKEN_EVERY % 3]
        path.with_suffix(".jpg" if copied else ".png").write_bytes(value)


def digest(path: Path) -> str:
    """Returns a hash of a file, or of the names and bytes of all files in a directory."""
    whole = hashlib.sha256()
    for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if one.is_file():
            whole.update(f"{one.relative_to(path)}\0".encode() + hashlib.sha256(one.read_bytes()).digest())
    return whole.hexdigest()


def rows_of(path: Path) -> list[Any]:
    """Returns all rows of an output, as :class:`Row`."""
    sink = sink_of("parquet" if path.is_file() else "webdataset")
    return [row for part in ([path] if path.is_file() else sorted(path.glob("*.tar"))) for row in sink.rows(part)]


def killed_runs(root: Path, case: Case, arguments: Any, killer: Killer, ways: list[str]) -> dict[str, Any]:
    """Makes an output without kills, then makes it again for each way of killing in ``ways``, with killed runs.

    Returns how the outputs compare.
    """
    out = root / "out" / case.name

    def make() -> None:
        options = BulkOptions(
            arguments.bundle, captions=case.captions, generation=case.generation, duplicates=case.duplicates,
            chunk_size=100, threads=1,
        )  # fmt: skip
        form = None if out.suffix else "webdataset"
        run_bulk(PictureSource(str(root / "pictures")), Output.named(out, form, case.force), options)

    def fresh() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if case.force:
            shutil.copyfile(other, out)

    other = root / "other.parquet"

    def make_other() -> None:
        options = BulkOptions(arguments.bundle, threads=1, generation={"max_new_tokens": 1})
        run_bulk(PictureSource(str(root / "one")), Output.named(other, None, False), options)

    if case.force:
        failed = killer.measure(ways[0], ("other", False, False), make_other)
        if failed:
            raise RuntimeError(failed)
    key, whole, start = (case.name, False, False), [], time.monotonic()
    for way in ways:
        fresh()
        failed = killer.measure(way, key, make)
        if failed:
            raise RuntimeError(failed)
        whole.append(digest(out))
    rows = rows_of(out)
    fresh()
    kills: Counter[str] = Counter()
    number, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        way = ways[number % len(ways)]
        status = killer.kill(way, key, make, share=arguments.share)
        kills[way] += status == -signal.SIGKILL
        number += 1
    images = Counter(row.image for row in rows_of(out)) if out.exists() else Counter()
    left = sorted(path.name for path in out.parent.iterdir() if path != out)
    return {
        "output": case.name,
        "pictures": len(rows),
        "broken": sum(row.error is not None for row in rows),
        "duplicates": sum(row.duplicate_of is not None for row in rows),
        "whole_runs_equal": len(set(whole)) == 1,
        "kills": dict(kills),
        "last_status": status,
        "equal_bytes": status == 0 and digest(out) == whole[0],
        "each_once": bool(images) and set(images.values()) == {1} and len(images) == len(rows),
        "left": left,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--share", type=float, default=0.12, help="latest time of a kill, as a share of a run's length")
    parser.add_argument("--least", type=int, default=20, help="fail if there are fewer kills than this in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.bundle = arguments.bundle.absolute()
    ways = [way for way in WAYS if way != "system" or shutil.which("strace")]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw(root / "pictures", arguments.pictures)
        draw(root / "one", 1)
        killer = Killer(root, random.Random(arguments.seed))
        cases = []
        for case in CASES:
            cases.append(killed_runs(root, case, arguments, killer, ways))
            print(cases[-1], flush=True)
    kills = sum(sum(case["kills"].values()) for case in cases)
    held = kills >= arguments.least and all(
        case["whole_runs_equal"] and case["equal_bytes"] and case["each_once"] and not case["left"] for case in cases
    )
    write_result(arguments.json, load=os.getloadavg(), kills=kills, held=held, cases=cases)
    print(f"{kills} kills, {'held' if held else 'NOT HELD'}")
    return 0 if held else 1


if __name__ == "__main__":
    run_script(main)
