"""Trainings in processes of their own, killed and resumed, alone and in pairs; prints what they left as JSON.

    python tests/training/forked.py DIRECTORY

One process imports everything once and forks the others, so that ten of them cost little more than one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from blip2edge.errors import Blip2EdgeError
from blip2edge.training import snapshots
from blip2edge.training.run import train

ROOT = Path(__file__).parents[2]
KILLED_AFTER = 3  # steps; a snapshot is written every second one
MOST = 20  # lives


def fork(work: Callable[[], None], **environment: str) -> int:
    """Starts a process; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        work()
        status = 0
    except Blip2EdgeError as error:
        sys.stderr.write(f"{error}\n")
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """How a process ended: its status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hashes(directory: Path) -> dict[str, str]:
    """Of the weights of a run."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob("*.safetensors"))
    }


def log(directory: Path) -> list[Any]:
    """The log without its times."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def killing(after: int) -> Callable[[str, int, int], None]:
    """A progress callback that kills its process."""
    left = [after]

    def progress(stage: str, done: int, total: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def die_while_writing() -> None:
    """Makes the next snapshot kill its process between its two files."""
    write = snapshots._write

    def half(path: Path, content: bytes) -> None:
        if path.name == snapshots.FACTS:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    snapshots._write = half


def resumed(root: Path) -> dict[str, Any]:
    """A run that is never interrupted, and one that is killed again and again."""
    recipe, whole, broken = root / "recipe.toml", root / "whole", root / "broken"

    def run(out: Path, **options: Any) -> None:
        train("stage2", recipe, out, evaluation_scenes=0, **options)

    wait(fork(lambda: run(whole), XDG_CACHE_HOME=str(root / "cache-1")))
    ends = []
    for life in range(MOST):

        def work(life: int = life) -> None:
            if life == 2:
                die_while_writing()
            run(broken, progress=killing(KILLED_AFTER))

        ends.append(wait(fork(work, XDG_CACHE_HOME=str(root / "cache-2"))))
        if broken.exists():
            break
    left = sorted(path.name for path in root.iterdir() if path.name.startswith("."))
    same_log = log(whole) == log(broken)
    return {
        "ends": ends,
        "whole": hashes(whole),
        "broken": hashes(broken),
        "same_log": same_log,
        "left": left,
    }


def paired(root: Path) -> dict[str, Any]:
    """Stage 2 of two processes, of one with twice the batch, and of one that sums two batches to a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(name: str) -> None:
        train("stage2", root / f"{name}.toml", root / name, evaluation_scenes=0)

    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    children = [fork(lambda: run("two"), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    ends = [wait(child) for child in children]
    ends += [wait(fork(lambda name=name: run(name))) for name in ("one", "summed")]  # type: ignore[misc]
    weights = {name: load_file(root / name / "model.safetensors") for name in ("two", "one", "summed")}
    # A key's bias has no gradient but rounding (softmax forgets it), of which Adam makes whole steps.
    compared = {key: tensor for key, tensor in weights["one"].items() if not key.endswith("key.bias")}
    difference = {
        name: max(float((weights[name][key] - tensor).abs().max()) for key, tensor in compared.items())
        for name in ("two", "summed")
    }
    start = load_file(root / "start" / "model.safetensors")
    moved = max(float((start[key] - tensor).abs().max()) for key, tensor in weights["one"].items())
    losses = {name: [line["loss"] for line in log(root / name)] for name in weights}
    return {"ends": ends, "difference": difference, "moved": moved, "losses": losses}


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    results = {"resumed": resumed(root)}
    if (root / "two.toml").exists():
        wait(fork(lambda: train("stage2", root / "start.toml", root / "start", evaluation_scenes=0) and None))
        results["paired"] = paired(root)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
