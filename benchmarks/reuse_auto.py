"""Missed changes and time saved by ``watch --reuse-below auto``: ``python benchmarks/reuse_auto.py --json FILE``.

Thresholds are fitted on one film of each kind of ``reuse_films.py``, and used on other films, with other scenes. Each
film is also captioned with every frame encoded; where the captions differ, a change was missed. Fits:

    same kind    on the film of the same kind, as for a camera that stays where it is

    all kinds    on the films of all three kinds
    other kinds  on the films of the two kinds that the tested film is not of
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reporting import CHECKPOINT, parser_of, write_result
from reuse_films import KINDS, NOISE, Film, film

from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.reuse.fit import Recording, fit_thresholds
from blip2edge.runtime.captioning.reuse.ladder import ReuseLadder, ReusePlan, fit_document, fit_key
from blip2edge.runtime.serving.streams.sources import Frame
from blip2edge.runtime.serving.watch import WatchResult, watch

RATES = (0.02, 0.05)
FIT_SEED, TEST_SEED = 41, 52


def frames_of(pictures: Film) -> Iterator[Frame]:
    for index, picture in enumerate(pictures):
        yield Frame(str(index), picture)


def recorded(captioner: Captioner, pictures: Film) -> Recording:
    """The recording of a film, of which every frame is encoded."""
    plan = ReusePlan(frames=len(pictures) + 1)
    ladder = ReuseLadder(captioner.encoder, captioner.generator, captioner.options(), plan, {})
    for picture in pictures:
        ladder(picture)
    return ladder.recording


def joined(recordings: Sequence[Recording]) -> Recording:
    found = Recording()
    for one in recordings:
        for values in zip(one.cells, one.features, one.texts, one.times, strict=True):
            found.add(*values)
    return found


def timed(captioner: Captioner, pictures: Film, **options: Any) -> tuple[list[WatchResult], float]:
    """The results of a film, and its CPU milliseconds a frame."""
    start = time.process_time()
    results = list(watch(captioner, frames_of(pictures), every=True, **options))
    return results, (time.process_time() - start) / len(pictures) * 1e3


def texts_of(results: Sequence[WatchResult]) -> list[str]:
    return [one.result.text for one in results if one.result is not None]


def overlooked(given: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
    """Changes of the caption, and those whose caption was given in none of the frames until the next change."""
    starts = [at for at in range(1, len(wanted)) if wanted[at] != wanted[at - 1]]
    ends = [*starts[1:], len(wanted)]
    missed = sum(wanted[start] not in given[start:end] for start, end in zip(starts, ends, strict=True))
    return len(starts), missed


def tested(
    captioner: Captioner, pictures: Film, full: tuple[list[WatchResult], float], plan: ReusePlan
) -> dict[str, Any]:
    """The figures of one film with a kept fit."""
    sentences: list[str] = []
    plan = ReusePlan(plan.rate, plan.frames, plan.path, report=sentences.append)
    results, cpu_ms = timed(captioner, pictures, reuse_below="auto", reuse=plan)
    given, wanted, count = texts_of(results), texts_of(full[0]), len(pictures)
    steps = Counter(one.step for one in results)
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
        "cpu_ms_full": round(full[1], 3),
        "cpu_ms": round(cpu_ms, 3),
        "time_saved": round(1 - cpu_ms / full[1], 4),
        "audit": results[-1].audit,
        "fitted_again": sentences,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--fit-frames", type=int, default=3000, metavar="N", help="of each kind")
    parser.add_argument("--frames", type=int, default=2000, metavar="N", help="of each tested film")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_checkpoint(CHECKPOINT, Path(folder) / "bundle").bundle
        captioner = Captioner.load(bundle, backend="cpu", threads=1)
        recordings = {kind: recorded(captioner, film(kind, options.fit_frames, FIT_SEED)) for kind in KINDS}
        fits = {("same kind", kind): [kind] for kind in KINDS}
        fits |= {("all kinds", kind): list(KINDS) for kind in KINDS}
        fits |= {("other kinds", kind): [other for other in KINDS if other != kind] for kind in KINDS}
        films = {kind: film(kind, options.frames, TEST_SEED) for kind in KINDS}
        full = {kind: timed(captioner, pictures) for kind, pictures in films.items()}
        for (name, kind), used in fits.items():
            recording = joined([recordings[one] for one in used])
            for rate in RATES:
                plan = ReusePlan(rate, options.fit_frames, Path(folder) / "fit.json")
                fit = fit_thresholds(recording, rate)
                document = fit_document(fit, fit_key(captioner.bundle, None, captioner.options(), plan))
                Path(folder, "fit.json").write_text(json.dumps(document))
                figures = tested(captioner, films[kind], full[kind], plan)
                rows.append({"fitted_on": name, "film": kind, "stated": rate, **figures, "fit": document["chosen"]})
                print(json.dumps(rows[-1]), flush=True)
    write_result(options.json, noise=NOISE, fit_frames=options.fit_frames, results=rows)


if __name__ == "__main__":
    main()
