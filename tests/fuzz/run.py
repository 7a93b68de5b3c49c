"""Runs mutated files through the readers: ``python -m tests.fuzz.run --inputs 1000000 --json out.json``.

Each target runs in processes of its own, with a limit on memory (``RLIMIT_AS``) and on the time of an input. An input
passes if the reader returns, or raises one of its declared errors. Anything else is a finding: another exception, a
declared error that hides a fault of our own code, a crash, no end, or memory that the system refused. Runs with the
same seed have the same inputs, by number.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.corpus import Corpus
from tests.fuzz.mutations import of_bytes
from tests.fuzz.targets import TARGETS, Read, Target

MEMORY = 3 << 30  # bytes that an input may take besides what the process has
STATE = struct.Struct("<qqqd")  # number of the input, accepted, refused, time of its start
SLACK = 20.0  # seconds beyond the limit, until a process that does not react is killed
FAULTS = (TypeError, KeyError, IndexError, AttributeError, AssertionError, ZeroDivisionError, NameError)
ROOT = Path(__file__).resolve().parents[2]
KEPT = 5  # findings of one kind whose input is kept


@dataclass
class Outcome:
    """What came of the inputs of one target.

    Attributes:
        tried: Number of inputs.
        accepted: Inputs that were read without an error.
        refused: Inputs that raised a declared error.
        findings: Number of all others by kind.
        examples: Some of their numbers, by kind.
        seconds: Duration.
        skipped: Why the target did not run.
    """

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    findings: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: str = ""

    @property
    def failed(self) -> int:
        """Number of inputs that did not hold."""
        return sum(self.findings.values())

    def add(self, kind: str, number: int) -> None:
        """Counts a finding."""
        self.findings[kind] = self.findings.get(kind, 0) + 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < KEPT:
            kept.append(number)


class _TooLong(BaseException):
    """An input took longer than its limit."""


def mutated(target: Target, name: str, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """The input of a number: mutations of a seed; the first inputs are the seeds themselves."""
    if number < len(seeds):
        return seeds[number]
    rng = random.Random(f"{seed}/{name}/{number}")
    content = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            content = target.mutate(content, rng)
        except Exception:  # noqa: BLE001 - an earlier mutation spoiled the structure
            content = of_bytes(content, rng)
    return content


def _kind(error: BaseException) -> str:
    """Class and place of an exception: where it was raised, and the last line of this project on the way."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/tests/" not in frame.filename]
    place = ours[-1] if ours else frames[-1]
    text = " ".join(str(error).split())[:80]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno} ({text})"


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


def own_fault(error: BaseException) -> str:
    """The kind of a declared error whose cause is a fault of our own code; empty for others.

    The guard of the readers turns every exception into a declared error. A line of this project that raises a KeyError
    or a TypeError did not check what it uses.
    """
    cause = error.__cause__
    if not isinstance(cause, FAULTS):
        return ""
    place = traceback.extract_tb(cause.__traceback__)[-1].filename
    ours = place.startswith(f"{ROOT}/") and "site-packages" not in place and "/tests/" not in place
    return f"hidden by the guard: {_kind(cause)}" if ours else ""


def _try(read: Any, content: bytes, target: Target) -> str:
    """Reads one input; returns the kind of finding, ``accepted`` or ``refused``."""
    signal.setitimer(signal.ITIMER_REAL, target.seconds)
    try:
        read(content)
        return "accepted"
    except target.errors as error:
        return "out of memory" if _out_of_memory(error) else own_fault(error) or "refused"
    except _TooLong:
        return f"longer than {target.seconds:g} s"
    except Exception as error:  # noqa: BLE001 - the findings
        return "out of memory" if _out_of_memory(error) else _kind(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return _kind(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _on_alarm(number: int, frame: Any) -> None:
    raise _TooLong


def warm(read: Read, seeds: Sequence[bytes], errors: tuple[type[Exception], ...]) -> None:
    """Reads the seeds without a limit, which imports what the reader needs."""
    for content in seeds:
        with contextlib.suppress(*errors):
            read(content)


def _work(
    name: str, corpus: Corpus, seeds: Sequence[bytes], span: range, seed: int, state: mmap.mmap, out: int
) -> None:
    """The process of a target: reads its inputs and writes findings as lines to ``out``."""
    target = TARGETS[name]
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _on_alarm)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=os.environ.get("FUZZ_FOLDER")))
    accepted, refused = 0, 0
    try:
        read = target.prepare(corpus, folder)
        warm(read, seeds, target.errors)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for number in span:
            state[:] = STATE.pack(number, accepted, refused, time.monotonic())
            content = mutated(target, name, seeds, seed, number)
            found = _try(read, content, target)
            accepted += found == "accepted"
            refused += found == "refused"
            if found not in ("accepted", "refused"):
                os.write(out, (json.dumps([number, found]) + "\n").encode())
        state[:] = STATE.pack(span.stop, accepted, refused, time.monotonic())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fuzz(name: str, corpus: Corpus, count: int, seed: int, start: int = 0, deadline: float = float("inf")) -> Outcome:
    """Runs inputs through one target, in processes that are started again after a crash.

    Args:
        name: A key of :data:`TARGETS`.
        corpus: The seeds.
        count: Number of inputs.
        seed: Seed of the mutations.
        start: Number of the first input.
        deadline: Time of ``time.monotonic`` at which the target ends early.
    """
    target, outcome, began = TARGETS[name], Outcome(), time.monotonic()
    absent = [package for package in target.packages if importlib.util.find_spec(package) is None]
    if absent:
        outcome.skipped = f"{', '.join(absent)} is not installed"
        return outcome
    seeds, at = target.seeds(corpus), start
    while at < start + count and time.monotonic() < deadline:
        at = _one_process(name, corpus, seeds, range(at, start + count), seed, outcome, deadline)
    outcome.tried = at - start
    outcome.seconds = time.monotonic() - began
    return outcome


def _one_process(
    name: str, corpus: Corpus, seeds: Sequence[bytes], span: range, seed: int, outcome: Outcome, deadline: float
) -> int:
    """Runs one process until it ends; returns the number of the next input."""
    state = mmap.mmap(-1, STATE.size)
    state[:] = STATE.pack(span.start, 0, 0, time.monotonic() + 60)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            quiet = os.open(os.devnull, os.O_WRONLY)
            if not os.environ.get("FUZZ_LOUD"):
                os.dup2(quiet, 2)  # libraries write their own lines
            _work(name, corpus, seeds, span, seed, state, writer)
            code = 0
        except BaseException:  # noqa: BLE001 - told to the parent
            os.write(writer, (json.dumps([-1, traceback.format_exc()]) + "\n").encode())
        os._exit(code)
    os.close(writer)
    stopped, text, hung = False, b"", False
    while True:
        with contextlib.suppress(BlockingIOError):
            text += os.read(reader, 1 << 20)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        number, _, _, since = STATE.unpack(state[:])
        if time.monotonic() - since > TARGETS[name].seconds + SLACK:
            hung = True
            os.kill(child, signal.SIGKILL)
        elif time.monotonic() > deadline and not stopped:
            stopped = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    while part := _rest(reader):
        text += part
    os.close(reader)
    number, accepted, refused, _ = STATE.unpack(state[:])
    outcome.accepted += accepted
    outcome.refused += refused
    for line in text.splitlines():
        at, kind = json.loads(line)
        if at < 0:
            raise RuntimeError(f"the target {name} does not start: {kind}")
        outcome.add(kind, at)
    if hung:
        outcome.add("no end, not even by a signal", number)
        return number + 1
    if stopped:
        return number
    if os.WIFSIGNALED(status):
        outcome.add(f"crash: {signal.Signals(os.WTERMSIG(status)).name}", number)
        return number + 1
    return span.stop


def _rest(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 20)
    except BlockingIOError:
        return b""


def table(outcomes: Mapping[str, Outcome]) -> str:
    """The outcomes as a table in Markdown."""
    rows = ["| Reader | tried | read | refused | failed |", "|---|---:|---:|---:|---:|"]
    for name, each in outcomes.items():
        if each.skipped:
            rows.append(f"| {name} | – | – | – | skipped: {each.skipped} |")
        else:
            rows.append(f"| {name} | {each.tried:,} | {each.accepted:,} | {each.refused:,} | {each.failed:,} |")
    total = [
        sum(getattr(each, key) for each in outcomes.values()) for key in ("tried", "accepted", "refused", "failed")
    ]
    return "\n".join([*rows, "| **all** | " + " | ".join(f"{value:,}" for value in total) + " |"])


def merged(documents: Sequence[Mapping[str, Any]]) -> dict[str, Outcome]:
    """The sums of several runs, which had other seeds or first numbers; readers in the order of :data:`TARGETS`."""
    found: dict[str, Outcome] = {}
    for name in TARGETS:
        for values in (document["readers"][name] for document in documents if name in document["readers"]):
            each, one = found.setdefault(name, Outcome()), Outcome(**values)
            for key in ("tried", "accepted", "refused", "seconds"):
                setattr(each, key, getattr(each, key) + getattr(one, key))
            for kind, number in one.findings.items():
                each.findings[kind] = each.findings.get(kind, 0) + number
            each.skipped = one.skipped
    return found


def counts(inputs: int, names: Sequence[str], least: int) -> Iterator[tuple[str, int]]:
    """The number of inputs of each target, by its share."""
    whole = sum(TARGETS[name].share for name in names)
    for name in names:
        yield name, max(least, round(inputs * TARGETS[name].share / whole))


def made_corpus(folder: Path) -> Corpus:
    """A corpus of a tiny checkpoint and its bundle, which are made in ``folder`` where they are missing."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    if not (bundle / "bundle.json").is_file():
        from blip2edge.export.pipeline import export_checkpoint
        from tests import drawing

        export_checkpoint(drawing.save(checkpoint).directory, bundle)
    return Corpus(checkpoint, bundle)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="number of inputs over all readers")
    parser.add_argument("--least", type=int, default=0, help="least number of inputs of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input of each reader")
    parser.add_argument("--only", action="append", metavar="READER", help="one reader; may be repeated")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="longest time of one reader")
    parser.add_argument("--corpus", type=Path, help="folder of the seeds' checkpoint and bundle, made if it is missing")
    parser.add_argument("--json", type=Path, help="write the outcome to this file")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="print the table of earlier --json files")
    parser.add_argument("--keep", type=Path, help="write the inputs of findings to this folder")
    options = parser.parse_args()
    if options.merge:
        print(table(merged([json.loads(path.read_text()) for path in options.merge])))
        return 0
    names = options.only or list(TARGETS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as own:
        os.environ["XDG_CACHE_HOME"] = own
        folder = options.corpus or Path(own) / "corpus"
        folder.mkdir(parents=True, exist_ok=True)
        corpus = made_corpus(folder)
        gc.freeze()
        outcomes: dict[str, Outcome] = {}
        for name, count in counts(options.inputs, names, options.least):
            deadline = time.monotonic() + options.seconds
            outcomes[name] = each = fuzz(name, corpus, count, options.seed, options.start, deadline)
            print(f"{name}: {each.tried} tried, {each.failed} failed, {each.seconds:.0f} s", flush=True)
            for kind, number in sorted(each.findings.items(), key=lambda item: -item[1]):
                print(f"    {number} × {kind}: inputs {each.examples[kind]}", flush=True)
            if options.keep is not None:
                _keep(options.keep, name, corpus, each, options.seed)
            if options.json is not None:
                document = {"seed": options.seed, "start": options.start}
                readers = {key: asdict(value) for key, value in outcomes.items()}
                options.json.write_text(json.dumps({**document, "readers": readers}, indent=2) + "\n")
    print(table(outcomes))
    return 1 if any(each.failed for each in outcomes.values()) else 0


def _keep(folder: Path, name: str, corpus: Corpus, outcome: Outcome, seed: int) -> None:
    seeds = TARGETS[name].seeds(corpus) if outcome.examples else []
    for numbers in outcome.examples.values():
        for number in numbers:
            path = folder / name.replace(" ", "-") / str(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(mutated(TARGETS[name], name, seeds, seed, number))


if __name__ == "__main__":
    sys.exit(main())
