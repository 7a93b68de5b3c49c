"""Kills the commands that write files, many times, and checks the files after each kill.

    python -m tests.faults --kills 300 --seed 1 --json benchmarks/results/faults.json

A process imports everything once and forks each run. A run is killed (SIGKILL) in one of three ways:

    time     at a random moment of its usual duration
    call     as it is about to make a random one of its calls that change the disk (Python's audit events)
    system   as the system has just done a random one of them (strace; only where it is installed)

After each kill: the name holds the old or the new output, complete (hashes, and a caption; for training, a checkpoint
that loads); the next run of the same output succeeds and leaves nothing but the output. Half of the runs replace an
output, the others make one. A third of the replacing runs cannot exchange names, as on systems without ``renameat2``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what every optimiser would import after the fork

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.outputs import publishing
from blip2edge.bundle.outputs.locks import part_of
from blip2edge.bundle.trust.integrity import STAMPS

WAYS = ("time", "call", "system")
NAMES = ("export", "calibrate", "search", "optimize", "build", "capfilt", "train")
OF_BUNDLES = NAMES[:5]  # commands that read a bundle or a checkpoint
EVENTS = frozenset(
    (
        "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree", "shutil.copyfile",
        "fcntl.flock", "ctypes.call_function",
    )
)  # fmt: skip
SYSTEM_CALLS = "rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,fsync,ftruncate,flock"
TIMEOUT_S = 300
PRELOADED = (
    "blip2edge.calibration.search.pipeline",
    "blip2edge.export.pipeline",
    "blip2edge.optimization.pipeline",
    "blip2edge.runtime.captioning.captioner",
    "blip2edge.training.capfilt.pipeline",
    "blip2edge.training.run",
    "tests.drawing",
)
SCRATCH = "scratch"  # the directory of TMPDIR and of the user's cache


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        name: Name in the table.
        run: Runs it: the output, and whether to replace it.
        check: Raises an error if the output is not complete.
        old: Makes an output that is replaced.
    """

    name: str
    run: Callable[[Path, bool], None]
    check: Callable[[Path], None]
    old: Callable[[Path], None]


@dataclass
class Tally:
    """The kills of one command in one way."""

    kills: int = 0
    too_late: int = 0
    held: int = 0
    litter_bytes: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


# Commands


def _bundle_checked(bundle: Path) -> None:
    from blip2edge.runtime.captioning.captioner import Captioner
    from tests.drawing import draw_pictures

    Bundle.open(bundle).verify()
    with contextlib.closing(Captioner.load(bundle, backend="cpu", threads=1)) as captioner:
        captioner.caption(draw_pictures(1)[0], max_new_tokens=2)


def _engines_checked(bundle: Path) -> None:
    from blip2edge.runtime.backends.engine_files import EngineSet, engine_folders

    _bundle_checked(bundle)
    for folder in engine_folders(Bundle.open(bundle)):
        EngineSet.read(folder).verify()


def _copy_checked(bundle: Path) -> None:
    from blip2edge.runtime.backends.optimized_copy import read_copy

    _bundle_checked(bundle)
    read_copy(Bundle.open(bundle), "cpu", use_stamps=False)


def _shards_checked(directory: Path) -> None:
    from blip2edge.bundle.trust.integrity import sha256_of

    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    for shard in report["shards"]:
        assert sha256_of(directory / shard["file"]) == shard["sha256"], shard["file"]


def _checkpoint_checked(directory: Path) -> None:
    from blip2edge.model.checkpoint.directory import load_checkpoint

    assert load_checkpoint(directory)
    assert json.loads((directory / "training.json").read_text(encoding="utf-8"))["phases"]


Tallies = dict[str, dict[str, Tally]]


class Workplace:
    """Inputs of the commands, made once.

    Args:
        root: An empty directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoint, self.parent = root / "checkpoint", root / "parent"
        self.pictures, self.web, self.recipe = root / "pictures", root / "web", root / "recipe.toml"

    def make(self, *, bundle: bool) -> None:
        """Draws a checkpoint, exports it if ``bundle`` is True, and draws pictures; in a process of its own."""
        from blip2edge.export.pipeline import export_checkpoint
        from tests import drawing
        from tests.training import recipes

        if bundle:
            drawing.save(self.checkpoint, seed=3, vision_layers=1, qformer_layers=1, layers=1)
            export_checkpoint(self.checkpoint, self.parent)
        for folder in (self.pictures, self.web):
            folder.mkdir()
            for number, picture in enumerate(drawing.draw_pictures(4)):
                picture.resize((32, 32)).save(folder / f"{number}.png")
                (folder / f"{number}.txt").write_text(f"number {number}\n")
        recipes.write(self.recipe, stage2="itg_weight = 1.0", loop="snapshot_every = 2\nworkers = 0")

    def commands(self) -> dict[str, Command]:
        """All commands by name."""
        copied = lambda out: shutil.copytree(self.parent, out)  # noqa: E731
        return {
            command.name: command
            for command in (
                Command("export", self._export, _bundle_checked, copied),
                Command("calibrate", self._calibrate, _bundle_checked, copied),
                Command("search", self._search, _bundle_checked, copied),
                Command("optimize", self._optimize, _copy_checked, self._optimized),
                Command("build", self._build, _engines_checked, self._built),
                Command("capfilt", self._capfilt, _shards_checked, lambda out: self._capfilt(out, False)),
                Command("train", self._train, _checkpoint_checked, lambda out: self._train(out, False)),
            )
        }

    def _export(self, out: Path, force: bool) -> None:
        from blip2edge.export.pipeline import export_checkpoint

        export_checkpoint(self.checkpoint, out, precision="fp16", force=force)

    def _calibrate(self, out: Path, force: bool) -> None:
        from blip2edge.calibration.pipeline import calibrate

        calibrate(self.parent, out, images=self.pictures, count=2, force=force, threads=1, activations=("bridge",))

    def _search(self, out: Path, force: bool) -> None:
        from blip2edge.calibration.search import measure
        from blip2edge.calibration.search.pipeline import search
        from blip2edge.calibration.search.points import SearchOptions

        measure.ROUNDS = 1
        options = SearchOptions(formats=("w8a8",), measured=1, scored=2)
        search(self.parent, out, images=self.pictures, options=options, count=2, force=force, threads=1)

    def _optimize(self, out: Path, force: bool) -> None:
        from blip2edge.optimization.pipeline import optimize

        if not force:
            shutil.copytree(self.parent, out, dirs_exist_ok=True)
        optimize(out, "cpu")

    def _optimized(self, out: Path) -> None:
        self._optimize(out, False)

    def _build(self, out: Path, force: bool) -> None:
        from blip2edge.engine import build

        if not force:
            shutil.copytree(self.parent, out, dirs_exist_ok=True)
        build._in_process = lambda task, plan, staging: build._build_one(  # a fork cannot start a pool of processes
            task.options, plan, task.version, staging / f"{plan.name}.engine", False
        )
        if importlib.util.find_spec("tensorrt_rtx") is None:
            _stand_in(build)
        build.build_bundle(out, target="rtx", sm=(86,), capacity=32)

    def _built(self, out: Path) -> None:
        self._build(out, False)

    def _capfilt(self, out: Path, force: bool) -> None:
        from blip2edge.training.capfilt.pipeline import CapFiltOptions, ScoredPicture, run_capfilt
        from blip2edge.training.data.entries import by_picture
        from blip2edge.training.data.folder import read_folder

        def score(batches: Any, options: CapFiltOptions) -> Any:
            for batch in batches:
                time.sleep(0.01)
                yield [ScoredPicture(tuple((text, "web", 0.9) for text in shown.captions)) for shown in batch]

        entries, broken = read_folder(self.web, 0)
        options = CapFiltOptions(self.parent, self.parent, samples_per_shard=1)
        run_capfilt(by_picture(entries), broken, out, options, score_batches=score, force=force)

    def _train(self, out: Path, force: bool) -> None:
        from blip2edge.training.run import train

        resumes = any(out.parent.glob(f"{out.name}.run/step-*"))
        train("stage2", self.recipe, out, force=force, resume=resumes and force, evaluation_scenes=0)


def _stand_in(build: Any) -> None:
    """In the place of TensorRT for RTX, where it is not installed: engines of random bytes."""
    from types import SimpleNamespace

    from blip2edge.engine.builder import BuiltEngine

    def built(trt: Any, plan: Any, version: Any, output: Path, options: Any) -> BuiltEngine:
        output.write_bytes(os.urandom(1 << 16))
        return BuiltEngine(output, output.stat().st_size, 0.1, (), (), {})

    build.load_tensorrt = lambda target: SimpleNamespace(__version__="1.7.1")
    build.build_engine = built


# Processes


def fork(work: Callable[[], object], errors: Path) -> int:
    """Starts a process; returns its number. An error is written to a file."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - reported, and the process ends with status 1
        errors.write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Waits for a process and its own children; returns its status, or minus the signal that killed it."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"a run did not end within {TIMEOUT_S} s")
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def done(work: Callable[[], object], errors: Path) -> str:
    """Runs a function in a process; returns an empty text, or how it failed."""
    errors.unlink(missing_ok=True)
    status = wait(fork(work, errors))
    if status == 0:
        return ""
    return errors.read_text(encoding="utf-8").strip().splitlines()[-1] if errors.exists() else f"status {status}"


class Killer:
    """Runs a command in a process and kills it.

    Args:
        root: A directory for its own files.
        chance: The random generator.
    """

    def __init__(self, root: Path, chance: random.Random) -> None:
        self._root, self._chance = root, chance
        self._most: dict[tuple[str, str, bool, bool], float] = {}

    def kill(self, way: str, key: tuple[str, bool, bool], work: Callable[[], object], share: float = 1.0) -> int:
        """Runs ``work``, and kills it in one of :data:`WAYS`; returns its status.

        Args:
            way: How it is killed.
            key: Identifies runs of the same length.
            work: The run; it restores what it changes.
            share: Share of the run's length within which it is killed.
        """
        at = self._chance.uniform(0.0, share)
        most = self._most[(way, *key)]
        status: int = getattr(self, f"_{way}")(most * at, work)
        if status == 0 and at > 0.5:  # too late: the first run, which was measured, was longer
            self._most[(way, *key)] = most * at
        return status

    def measure(self, way: str, key: tuple[str, bool, bool], work: Callable[[], object]) -> str:
        """Runs ``work`` to its end, to learn its length; returns how it failed."""
        if (way, *key) in self._most:
            return ""
        log, start = self._root / "count", time.monotonic()
        log.unlink(missing_ok=True)
        status = getattr(self, f"_{way}")(None, work)
        length = time.monotonic() - start if way == "time" else float(len(log.read_text().splitlines()))
        self._most[(way, *key)] = length
        errors = self._root / "errors"
        return "" if status == 0 else errors.read_text(encoding="utf-8") if errors.exists() else f"status {status}"

    def _time(self, at: float | None, work: Callable[[], object]) -> int:
        child = fork(work, self._root / "errors")
        if at is not None:
            time.sleep(at)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        return wait(child)

    def _call(self, at: float | None, work: Callable[[], object]) -> int:
        log, left = self._root / "count", [None if at is None else int(at)]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in EVENTS and not (event == "open" and _writes(arguments)):
                return
            if left[0] is None:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(descriptor, f"{event}\n".encode())
                os.close(descriptor)
            elif left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                left[0] -= 1

        def hooked() -> None:
            busy = [False]

            def once(event: str, arguments: tuple[Any, ...]) -> None:
                if not busy[0]:
                    busy[0] = True
                    hook(event, arguments)
                    busy[0] = False

            sys.addaudithook(once)
            work()

        return wait(fork(hooked, self._root / "errors"))

    def _system(self, at: float | None, work: Callable[[], object]) -> int:
        def stopped() -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            work()

        child = fork(stopped, self._root / "errors")
        os.waitpid(child, os.WUNTRACED)
        which = f"trace={SYSTEM_CALLS}" if at is None else f"inject={SYSTEM_CALLS}:signal=KILL:when={int(at) + 1}"
        words = ["strace", "-q", "-o", str(self._root / "count"), "-e", which, "-p", str(child)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as tracer:
            while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{child}/status").read_text():
                if tracer.poll() is not None:
                    os.killpg(child, signal.SIGKILL)
                    raise RuntimeError("strace cannot trace a process here")
                time.sleep(0.002)
            os.kill(child, signal.SIGCONT)
            return wait(child)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


# Trials


class Trials:
    """Kills commands and checks what is left.

    Args:
        root: A directory for all files.
        seed: Seed of the random generator.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.chance = root, random.Random(seed)
        self.place, self.errors = Workplace(root / "inputs"), root / "errors"
        self.killer = Killer(root, self.chance)
        self.commands: dict[str, Command] = {}
        self._old: dict[str, Path] = {}

    def prepare(self, names: Sequence[str]) -> None:
        """Makes the inputs, and an old output of each command.

        Raises:
            RuntimeError: A command fails without a kill.
        """
        self.place.root.mkdir()
        self._new_scratch()
        failed = done(lambda: self.place.make(bundle=bool(set(names) & set(OF_BUNDLES))), self.errors)
        self.commands = {name: command for name, command in self.place.commands().items() if name in names}
        for name, command in self.commands.items():
            self._old[name] = self.root / f"old-{name}" / "out"
            self._old[name].parent.mkdir()
            failed = failed or done(partial(command.old, self._old[name]), self.errors)
            failed = failed or done(partial(command.check, self._old[name]), self.errors)
            if failed:
                raise RuntimeError(f"{name}: {failed}")

    def old(self, name: str) -> Path:
        """An output of a command, made before."""
        return self._old[name]

    def trial(self, name: str, way: str, tally: Tally) -> None:
        """Kills a command once, and checks."""
        replaces = self.chance.random() < 0.5
        twice = replaces and self.chance.random() < 1 / 3
        command, key = self.commands[name], (name, replaces, twice)
        out = self._begin(name, replaces)
        work = self._work(command, out, replaces, twice)
        failed = self.killer.measure(way, key, work)
        if failed:
            raise RuntimeError(f"{name}: {failed}")
        out = self._begin(name, replaces)
        status = self.killer.kill(way, key, work)
        tally.kills += 1
        if status == 0:
            tally.too_late += 1
        elif status != -signal.SIGKILL:
            text = self.errors.read_text(encoding="utf-8").strip().splitlines()[-1] if self.errors.exists() else ""
            tally.failures.append(f"the run ended with {status}: {text}")
            return
        tally.litter_bytes += self._litter(out)
        problems = self._problems(command, out, replaces=replaces, twice=twice)
        if problems:
            tally.failures.append("; ".join(problems))
        else:
            tally.held += 1

    def _begin(self, name: str, replaces: bool) -> Path:
        folder = self.root / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._new_scratch()
        out = folder / "out"
        if replaces:
            shutil.copytree(self._old[name], out)
        elif name in ("optimize", "build"):  # the bundle is there, and what is made in it is not
            shutil.copytree(self.place.parent, out)
        return out

    def _new_scratch(self) -> None:
        scratch = self.root / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        for name in ("tmp", "cache"):
            (scratch / name).mkdir(parents=True)
        os.environ["TMPDIR"], os.environ["XDG_CACHE_HOME"] = str(scratch / "tmp"), str(scratch / "cache")
        tempfile.tempdir = None

    def _work(self, command: Command, out: Path, replaces: bool, twice: bool) -> Callable[[], object]:
        def work() -> None:
            if twice:
                publishing._renameat2 = lambda *arguments: False
            command.run(out, replaces or command.name in ("optimize", "build"))

        return work

    def _litter(self, out: Path) -> int:
        """Bytes of what the killed run left beside its output, in the output's folders, and among temporary files."""
        found = [path for path in out.parent.iterdir() if path != out]
        found += [path for path in out.glob("*/.*") if path.name != STAMPS] if out.is_dir() else []
        found += list((self.root / SCRATCH / "tmp").iterdir())
        return sum(file.lstat().st_size for path in found for file in (path, *path.rglob("*")))

    def _problems(self, command: Command, out: Path, *, replaces: bool, twice: bool) -> list[str]:
        inside = command.name in ("optimize", "build")
        there = out.exists()
        problems = []
        if (replaces or inside) and not there and not (twice and (part_of(out) / "old").exists()):
            problems.append("nothing has the name")
        if there or twice:
            failed = done(lambda: _load(command, out), self.errors)
            problems += [f"what is there: {failed}"] if failed and (there or replaces) else []
        failed = done(lambda: command.run(out, True), self.errors)
        problems += [f"the next run: {failed}"] if failed else []
        if not failed:
            failed = done(lambda: command.check(out), self.errors)
            problems += [f"after the next run: {failed}"] if failed else []
        left = sorted(path.name for path in out.parent.iterdir() if path != out)
        left += [str(path.relative_to(out)) for path in out.rglob(".*") if path.name != STAMPS]
        left += [path.name for path in (self.root / SCRATCH / "cache").rglob(".*.part*")]
        return problems + ([f"left: {', '.join(left)}"] if left else [])


def _load(command: Command, out: Path) -> None:
    if command.name in ("capfilt", "train"):  # readers of these do not recover
        from blip2edge.bundle.outputs.locks import recover

        recover(out)
    command.check(out)


def run_trials(
    root: Path,
    kills: int,
    seed: int,
    names: Sequence[str],
    ways: Sequence[str],
    *,
    quiet: bool = False,
    report: Callable[[Tallies], None] | None = None,
) -> Tallies:
    """Kills each command in each way, as evenly as ``kills`` allows; ``report`` is called after each ten kills.

    Returns:
        Tallies by command and way.
    """
    trials = Trials(root, seed)
    trials.prepare(names)
    tallies = {name: {way: Tally() for way in ways} for name in names}
    turns = [(name, way) for name in names for way in ways]
    for number in range(kills):
        name, way = turns[number % len(turns)]
        tally, start, failures = tallies[name][way], time.monotonic(), len(tallies[name][way].failures)
        trials.trial(name, way, tally)
        tally.seconds += time.monotonic() - start
        if report is not None and (number % 10 == 9 or number + 1 == kills):
            report(tallies)
        if not quiet:
            for failure in tally.failures[failures:]:
                print(f"kill {number}, {name}, {way}: {failure}", flush=True)
            if number % 20 == 19:
                print(f"{number + 1} of {kills}", flush=True)
    return tallies


def table(tallies: Tallies) -> str:
    """The result as a table of Markdown."""
    lines = ["| command | kills | at a moment | before a call | after a call | held | failed | litter removed |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, by_way in tallies.items():
        counts = [by_way[way].kills - by_way[way].too_late if way in by_way else 0 for way in WAYS]
        held = sum(tally.held for tally in by_way.values()) - sum(tally.too_late for tally in by_way.values())
        failed = sum(len(tally.failures) for tally in by_way.values())
        litter = sum(tally.litter_bytes for tally in by_way.values()) / 1e6
        cells = [name, str(sum(counts)), *map(str, counts), str(held), str(failed), f"{litter:.1f} MB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the trials, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--commands", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS if shutil.which("strace") else WAYS[:2])
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="blip2edge-faults-") as folder:
        root = Path(folder)
        preload(root)
        start = time.monotonic()

        def report(tallies: Tallies) -> None:
            if options.json is not None:
                from tests.project import write_result

                results = {name: {way: asdict(one) for way, one in ways.items()} for name, ways in tallies.items()}
                seconds = round(time.monotonic() - start)
                write_result(options.json, seed=options.seed, seconds=seconds, tallies=results)

        tallies = run_trials(root, options.kills, options.seed, options.commands, options.ways, report=report)
    print(table(tallies))
    return 1 if any(tally.failures for ways in tallies.values() for tally in ways.values()) else 0


def preload(root: Path) -> None:
    """Imports what the runs need, and shares their traces."""
    from tests.traces import share_traces

    for name in PRELOADED:
        importlib.import_module(name)

    (root / "traces").mkdir()
    share_traces(root / "traces")


if __name__ == "__main__":
    sys.exit(main())
