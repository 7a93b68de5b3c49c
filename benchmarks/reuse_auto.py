"""Measures ``watch --reuse-below auto``: how many changes in a film it misses, and how much time it saves.

    python benchmarks/reuse_auto.py --json FILE

``reuse_films.py`` generates films of three kinds. Thresholds are fitted on one film of each kind, and used on test
films, which have other scenes. Each test film is also captioned with every frame encoded; where the captions differ, a
change was missed. For each test film, the thresholds are fitted in three ways:

    same kind    on the film of the same kind, as for a camera that stays where it is
    all kinds    on the films of all three kinds
    other kinds  on the films of the two other kinds
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from reporting import CHECKPOINT, parser_of, write_json, write_result
from reuse_films import KINDS, NOISE, Film, film

from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.reuse.fit import FrameTimes, Recording, fit_thresholds
from blip2edge.runtime.captioning.reuse.ladder import ReuseLadder, ReusePlan, fit_document, fit_key
from blip2edge.runtime.serving.streams.sources import Frame
from blip2edge.runtime.serving.watch import watch

RATES = (0.05, 0.1)
FIT_SEEDS, TEST_SEED = (41, 12), 63
PART = 500  # frames that are recorded at once


def frames_of(pictures: Film) -> Iterator[Frame]:
    for index, picture in enumerate(pictures):
        yield Frame(str(index), picture)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the JSON object in a file; if there is no file, calls ``make`` and writes its result to the file."""
    if not path.exists():
        write_json(path, make())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def recorded(captioner: Captioner, kind: str, frames: int, folder: Path) -> Recording:
    """Captions films of one kind, and returns the recording from which the thresholds are fitted.

    Every frame of these films is encoded. The recording is stored in files in ``folder``, and a later run reads it from
    there.
    """
    parts = []
    for seed, start in product(FIT_SEEDS, range(0, frames, PART)):
        path = folder / f"recording-{kind}-{seed}-{start}.npz"
        if not path.exists():
            plan = ReusePlan(frames=PART + 1)
            ladder = ReuseLadder(captioner.encoder, captioner.generator, captioner.options(), plan, {})
            for picture in film(kind, frames, seed)[start : start + PART]:
                ladder(picture)
            found = ladder.recording
            times = [(one.encode, one.decode) for one in found.times]
            np.savez(path, cells=found.cells, features=found.features, texts=found.texts, times=times)
        with np.load(path) as arrays:
            part = {name: arrays[name] for name in arrays.files}
        frame_times = [FrameTimes(*map(float, row)) for row in part["times"]]
        parts.append(Recording(list(part["cells"]), list(part["features"]), part["texts"].tolist(), frame_times))
    return joined(parts)


def joined(recordings: Sequence[Recording]) -> Recording:
    found = Recording()
    for one in recordings:
        for values in zip(one.cells, one.features, one.texts, one.times, strict=True):
            found.add(*values)
    return found


def timed(captioner: Captioner, pictures: Film, **options: Any) -> dict[str, Any]:
    """Captions a film frame by frame.

    Returns the captions, the step of each frame (what was reused), the result of the last check of the thresholds
    (audit), and the CPU milliseconds per frame.
    """
    start = time.process_time()
    results = list(watch(captioner, frames_of(pictures), every=True, **options))
    cpu_ms = (time.process_time() - start) / len(pictures) * 1e3
    texts = [one.result.text for one in results if one.result is not None]
    return {"texts": texts, "steps": [one.step for one in results], "audit": results[-1].audit, "cpu_ms": cpu_ms}


def overlooked(given: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
    """Returns how often the right caption changes, and how many of these changes were never shown.

    A change was never shown if no frame until the next change got the new caption.
    """
    starts = [at for at in range(1, len(wanted)) if wanted[at] != wanted[at - 1]]
    ends = [*starts[1:], len(wanted)]
    missed = sum(wanted[start] not in given[start:end] for start, end in zip(starts, ends, strict=True))
    return len(starts), missed


def tested(captioner: Captioner, pictures: Film, full: dict[str, Any], plan: ReusePlan) -> dict[str, Any]:
    """Captions a film with fitted thresholds, and compares time and captions with a run that encodes every frame.

    Returns the measured values. ``full`` is the result of that run.
    """
    sentences: list[str] = []
    plan = replace(plan, report=sentences.append)
    found = timed(captioner, pictures, reuse_below="auto", reuse=plan)
    given, wanted, count, cpu_ms = found["texts"], full["texts"], len(pictures), found["cpu_ms"]
    steps = Counter(found["steps"])
    reused = steps["skip"] + steps["caption"]
    missed = sum(one != other for one, other in zip(given, wanted, strict=True))
    changes, never = overlooked(given, wanted)
    return {
        "frames": count,
        "reused": reused,
        "missed": missed,
        "rate": round(missed / reused, 4) if reused else 0.0,
        "rate_of_all_frames": round(missed / count, 4),
        "changes": changes,
        "changes_never_shown": never,
        "vision_saved": round(steps["skip"] / count, 4),
        "decoding_saved": round(reused / count, 4),
        "cpu_ms_full": round(full["cpu_ms"], 3),
        "cpu_ms": round(cpu_ms, 3),
        "time_saved": round(1 - cpu_ms / full["cpu_ms"], 4),
        "audit": found["audit"],
        "said": sentences,
    }


def fitted(recording: Recording, captioner: Captioner, plan: ReusePlan) -> dict[str, Any]:
    fit = fit_thresholds(recording, plan.rate)
    return fit_document(fit, fit_key(captioner.bundle, None, captioner.options(), plan))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--fit-frames", type=int, default=2000, metavar="N", help="frames of each film for the fit")
    parser.add_argument("--frames", type=int, default=1200, metavar="N", help="frames of each tested film")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder of results that a later run uses again")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    if not (folder / "bundle").exists():
        export_checkpoint(CHECKPOINT, folder / "bundle")
    captioner = Captioner.load(folder / "bundle", backend="cpu", threads=1)
    recordings = {kind: recorded(captioner, kind, options.fit_frames, folder) for kind in KINDS}
    fits = [("all kinds", kind, list(KINDS)) for kind in KINDS]
    fits += [("same kind", kind, [kind]) for kind in KINDS]
    fits += [("other kinds", kind, [other for other in KINDS if other != kind]) for kind in KINDS]
    films = {kind: film(kind, options.frames, TEST_SEED) for kind in KINDS}
    full = {
        kind: kept(folder / f"full-{kind}.json", partial(timed, captioner, pictures))
        for kind, pictures in films.items()
    }
    rows = []
    for name, kind, used in fits:
        for rate in RATES:
            path = folder / f"fit-{'-'.join(used)}-{rate}.json"
            plan = ReusePlan(rate, options.frames + 1, path)
            recording = joined([recordings[one] for one in used])
            document = kept(path, partial(fitted, recording, captioner, plan))
            chosen = document["chosen"]
            write_json(path.with_name("used.json"), document)
            plan = replace(plan, path=path.with_name("used.json"))
            row = partial(tested, captioner, films[kind], full[kind], plan)
            found = kept(folder / f"row-{name}-{kind}-{rate}.json", row)
            rows.append({"fitted_on": name, "film": kind, "stated": rate, **found, "fit": chosen})
            print(json.dumps(rows[-1]), flush=True)
            write_result(options.json, noise=NOISE, fit_frames=options.fit_frames, results=rows)


if __name__ == "__main__":
    run_script(main)
