"""Trainings in separate processes, killed and resumed, alone and in pairs; prints their results as JSON.

    python tests/training/forked.py DIRECTORY

One process imports everything once and forks the others, so that ten processes take little more time than one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # what every optimiser would import after the fork
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from blip2edge.errors import Blip2EdgeError
from blip2edge.progress import ProgressCallback
from blip2edge.training import run as runs
from blip2edge.training.config import OptimizerConfig, parse_config
from blip2edge.training.data.config import DataConfig
from blip2edge.training.loading.batches import KeywordTexts, SceneBatches
from blip2edge.training.loading.loader import PictureBatch
from blip2edge.training.loop import loop, phase_state, snapshots
from blip2edge.training.loop.optim import make_optimizer
from blip2edge.training.loop.snapshots import Snapshot
from blip2edge.training.phases.stage2 import GenerativeStage
from blip2edge.training.run import train
from blip2edge.training.setup.miniature import build_miniature

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
    except Exception:  # noqa: BLE001 - told, and the process ends with status 1
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """How a process ended: its status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hashes(directory: Path) -> dict[str, str]:
    """Of the weights of a run."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("*.safetensors"))
    }


def log(directory: Path) -> list[Any]:
    """The log without its times."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def killing(after: int) -> ProgressCallback:
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


def group() -> dict[str, str]:
    """What torchrun tells two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def paired(root: Path) -> dict[str, Any]:
    """Stage 2 of two processes, of one with twice the batch, and of one that sums two batches to a step."""

    def run(name: str) -> None:
        train("stage2", root / f"{name}.toml", root / name, evaluation_scenes=0)

    shared = group()
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


def mixed(root: Path) -> dict[str, Any]:
    """Stage 2 on a mixture in two data streams: one process, two, and two that are killed and started again."""

    def run(name: str, after: int = 0) -> None:
        train("stage2", root / "mixed.toml", root / name, evaluation_scenes=0, progress=killing(after))

    def pair(name: str, rows: int, after: int = 0) -> list[int]:
        text = (root / "mixed.toml").read_text().replace("batch_size = 4", f"batch_size = {rows}")
        (root / "mixed.toml").write_text(text)
        shared = group()
        children = [fork(lambda: run(name, after), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
        return [wait(child) for child in children]

    ends = [wait(fork(lambda: run("mixed-one")))]
    ends += pair("mixed-two", 2)
    killed = pair("mixed-killed", 2, KILLED_AFTER)
    ends += pair("mixed-killed", 2)
    names = ("mixed-one", "mixed-two", "mixed-killed")
    weights = {name: load_file(root / name / "model.safetensors") for name in names}
    compared = {key: tensor for key, tensor in weights["mixed-one"].items() if not key.endswith("key.bias")}
    return {
        "ends": ends,
        "killed": killed,
        "difference": max(float((weights["mixed-two"][key] - each).abs().max()) for key, each in compared.items()),
        "losses": {name: [line["loss"] for line in log(root / name)] for name in names},
        "same": hashes(root / "mixed-two") == hashes(root / "mixed-killed"),
    }


def orphaned(root: Path) -> dict[str, Any]:
    """Two processes, of which the second is killed during stage 2: how the first ends, and what it says."""
    target, said, steps = root / "orphaned", root / "orphaned.txt", [0]

    def work(rank: int) -> None:
        step = loop._step

        def killing_step(*given: Any) -> dict[str, float]:
            steps[0] += 1
            if rank and steps[0] == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*given)

        vars(loop)["_step"] = killing_step
        try:
            train("stage2", root / "mixed.toml", target, evaluation_scenes=0)
        except Blip2EdgeError as error:
            said.write_text(f"{type(error).__name__}: {error}")
            raise

    shared = group()
    children = [fork(lambda rank=rank: work(rank), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)]  # type: ignore[misc]
    return {"ends": [wait(child) for child in children], "said": said.read_text()}


def scene_batch(parts: Any) -> PictureBatch:
    """A few scenes, the same each time."""
    batch = next(SceneBatches(2, 5, KeywordTexts(parts.tokenizer, 8, DataConfig())))
    torch.manual_seed(0)
    return PictureBatch(batch.sample_ids, torch.randn(2, 65, 32), batch.weight, batch.captions)


def spread_out(root: Path) -> dict[str, Any] | None:
    """A process of two that share the parameters of stage 2: what the first one found."""
    accelerator = Accelerator(cpu=True)
    recipe = parse_config((root / "recipe.toml").read_text())

    def begin() -> tuple[GenerativeStage, Any, PictureBatch]:
        parts = build_miniature(recipe)
        stage = GenerativeStage(parts.model)
        fully_shard(stage)
        return (
            stage,
            SimpleNamespace(optimizer=make_optimizer([stage], OptimizerConfig())),
            scene_batch(parts),
        )

    def steps(stage: GenerativeStage, optimizer: Any, batch: PictureBatch) -> None:
        for _ in range(2):
            stage(batch)["loss"].backward()
            optimizer.optimizer.step()
            optimizer.optimizer.zero_grad()

    stage, optimizer, batch = begin()
    steps(stage, optimizer, batch)
    kept = phase_state.capture(accelerator, stage, optimizer)
    if accelerator.is_main_process:
        save_file(kept, root / "sharded.safetensors")
    accelerator.wait_for_everyone()
    steps(stage, optimizer, batch)
    wanted = phase_state.capture(accelerator, stage, optimizer)
    stage, optimizer, batch = begin()
    phase_state.restore(
        accelerator, stage, optimizer, Snapshot(load_file(root / "sharded.safetensors"), {"processes": 2})
    )
    steps(stage, optimizer, batch)
    given = phase_state.capture(accelerator, stage, optimizer)
    local = sum(parameter.to_local().numel() for parameter in stage.parameters())  # type: ignore[attr-defined]
    phase_state.gather_parameters(accelerator, stage, stage)
    if not accelerator.is_main_process:
        return None
    whole = {name: value.detach() for name, value in stage.named_parameters() if value.requires_grad}
    return {
        "same": wanted.keys() == given.keys() and all(torch.equal(wanted[key], given[key]) for key in wanted),
        "collected": all(torch.equal(wanted[f"weights.{name}"], tensor) for name, tensor in whole.items()),
        "weights": len(whole),
        "share": local / sum(parameter.numel() for parameter in stage.parameters()),
    }


def sharded(root: Path) -> dict[str, Any]:
    """A phase in the middle, with parameters that are spread over two processes."""
    target = root / "sharded.json"

    def work() -> None:
        found = spread_out(root)
        if found is not None:
            target.write_text(json.dumps(found))

    shared = group()
    children = [fork(work, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    ends = [wait(child) for child in children]
    return {"ends": ends, **json.loads(target.read_text())}


def halves(root: Path) -> dict[str, Any]:
    """A run in bfloat16; one in float16, whose loss is scaled, that is killed, and one that is not."""
    text = (root / "recipe.toml").read_text()

    def run(name: str, kind: str, after: int = 0) -> None:
        path = root / f"{name}.toml"
        path.write_text(text.replace("[loop]", f'[loop]\nautocast = "{kind}"'))
        train("stage2", path, root / name, evaluation_scenes=0, progress=killing(after))

    ends = [wait(fork(lambda: run("bfloat16", "bfloat16")))]
    ends.append(wait(fork(lambda: run("float16", "float16", 15))))
    ends += [wait(fork(lambda name=name: run(name, "float16"))) for name in ("float16", "float16-whole")]  # type: ignore[misc]
    losses = {name: [line["loss"] for line in log(root / name)] for name in ("bfloat16", "float16")}
    return {
        "ends": ends,
        "losses": losses,
        "same": hashes(root / "float16") == hashes(root / "float16-whole"),
    }


def start(root: Path) -> None:
    """What the pairs begin with."""
    train("stage2", root / "start.toml", root / "start", evaluation_scenes=0)


def main() -> None:
    torch.set_num_threads(1)
    vars(runs)["draw_curve"] = lambda lines, path: False  # half of the time of so small a run
    root = Path(sys.argv[1])
    results = {"resumed": resumed(root), "half": halves(root), "sharded": sharded(root)}
    wait(fork(lambda: start(root)))
    results["paired"] = paired(root)
    results["mixed"] = mixed(root)
    results["orphaned"] = orphaned(root)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
