"""Trainings of two processes with and without sharded parameters (FSDP); prints their results as JSON.

    python -m tests.training.sharded DIRECTORY

The parent process has written the checkpoints of families and the recipes to the directory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what every optimiser would import after the fork
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2edge.errors import DataError
from blip2edge.training import run as runs
from blip2edge.training.data.scenes import scenes
from blip2edge.training.evaluation import validation as validations
from blip2edge.training.loop.optim import recompute_activations
from blip2edge.training.loop.sharding import clip_gradients, shard, views_allowed, whole_tensor
from blip2edge.training.phases.stage2 import GenerativeStage
from blip2edge.training.run import train
from blip2edge.training.setup.lora import add_lora, merge_lora
from tests.training.forked import fork, group, hashes, killing, log, wait
from tests.training.phases.test_stage2 import case

BRIDGES = {"llava": "mlp", "flamingo": "flamingo"}
STEPS = 3


def pair(work: Callable[[], None]) -> list[int]:
    """Runs a function in two processes that know each other; how they ended."""
    shared = group()
    children = [fork(work, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    return [wait(child) for child in children]


def steps(root: Path, kind: str, name: str, *, spread: bool, lora: bool = False) -> None:
    """Trains a family's checkpoint for a few steps; saves its first gradients, and what each process held."""
    accelerator = Accelerator(cpu=True)
    prompts = {"prompts": ("what is it ?", "a dog", "is it red")} if "instruct" in kind else {}
    made = case(None, root / kind, **prompts)
    if lora:
        if kind == "opt":  # not T5, whose rounded gradients depend on how tensors lie in memory
            made.ours.language.to(torch.bfloat16)
        add_lora(made.ours.language, 4, 8.0, "all")
    stage = GenerativeStage(made.ours, BRIDGES.get(kind, "qformer"))
    if lora:
        recompute_activations(stage)
    batch = made.batch._replace(image_embeds=made.batch.image_embeds * (1 + 0.3 * accelerator.process_index))
    sharding = shard(accelerator, (stage, made.ours.vision)) if spread else None
    held = sum(each.numel() for each in map(own, (*stage.parameters(), *made.ours.vision.parameters())))
    # Not AdamW, which makes whole steps of the rounding in gradients that are 0.
    optimizer = torch.optim.SGD([each for each in stage.parameters() if each.requires_grad], lr=0.05)
    module = stage if sharding is not None else accelerator.prepare(stage)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    with views_allowed():
        for _ in range(STEPS):
            loss = module(batch)["loss"]
            loss.backward()
            if not losses:
                trained = {name: each.grad for name, each in stage.named_parameters() if each.grad is not None}
                gradients = {name: whole_tensor(each).clone() for name, each in trained.items()}
            if sharding is not None:
                sharding.sync_scalars()
                clip_gradients(stage, 1.0)
            else:
                accelerator.clip_grad_norm_(stage.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    with torch.no_grad():
        seen = made.ours.vision(made.inputs["pixel_values"])  # the sharded frozen encoder runs
    if sharding is not None:
        sharding.undo()
        with torch.no_grad():
            assert torch.equal(seen, made.ours.vision(made.inputs["pixel_values"]))
    merge_lora(made.ours.language)
    if accelerator.is_main_process:
        save_file(gradients, root / f"{name}.gradients")
        facts = {"losses": losses, "held": held, "kinds": sorted({type(each).__name__ for each in stage.modules()})}
        (root / f"{name}.json").write_text(json.dumps(facts))


def own(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds."""
    local: Tensor = getattr(parameter, "to_local", lambda: parameter)()
    return local


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of two sets of weights, without the biases of keys (softmax forgets them)."""
    assert first.keys() == second.keys()
    names = [name for name in first if not name.endswith("key.bias") and first[name].is_floating_point()]
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in names)


def relative(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The norm of the difference of two sets of gradients, relative to the norm of the first."""
    assert first.keys() == second.keys()
    parts = [torch.cat([each[name].flatten() for name in first]) for each in (first, second)]
    return float((parts[0] - parts[1]).norm() / parts[0].norm())


def families(root: Path) -> dict[str, Any]:
    """Each family with plain and with sharded parameters."""
    found = {}
    for path in sorted(each for each in root.glob("family-*") if each.is_dir()):
        kind = path.name.removeprefix("family-")
        path.rename(root / kind)
        for lora in (False, True) if kind in ("opt", "t5") else (False,):
            name = f"{kind}-lora" if lora else kind
            ends = pair(partial(steps, root, kind, f"{name}-plain", spread=False, lora=lora))
            ends += pair(partial(steps, root, kind, f"{name}-spread", spread=True, lora=lora))
            gradients = [load_file(root / f"{name}-{each}.gradients") for each in ("plain", "spread")]
            plain, spread = (json.loads((root / f"{name}-{each}.json").read_text()) for each in ("plain", "spread"))
            found[name] = {
                "ends": ends,
                "losses": [plain["losses"], spread["losses"]],
                "gradient": relative(*gradients),
                "share": spread["held"] / plain["held"],
                "same_classes": plain["kinds"] == spread["kinds"],
            }
    return found


def recipes_of(root: Path) -> dict[str, Any]:
    """Whole runs of all phases by recipes: plain, sharded, and sharded runs that are killed and resumed."""

    def run(recipe: str, out: str, **options: Any) -> None:
        train("stage2", root / f"{recipe}.toml", root / out, evaluation_scenes=0, **options)

    ends = {}
    for name in ("plain", "spread", "plain-all", "spread-all"):
        ends[name] = pair(partial(run, name, name))
    for after in (11, 4):
        ends[f"killed-{after}"] = pair(partial(run, "spread-all", "killed", progress=killing(after)))
    ends["resumed"] = pair(partial(run, "spread-all", "killed"))
    pairs = {"plain": ("plain", "spread"), "all": ("plain-all", "spread-all")}
    return {
        "ends": ends,
        "losses": {
            key: [[line["loss"] for line in log(root / name)] for name in names] for key, names in pairs.items()
        },
        "difference": difference(*(load_file(root / name / "model.safetensors") for name in pairs["plain"])),
        "same": hashes(root / "spread-all") == hashes(root / "killed"),
        "same_log": log(root / "spread-all") == log(root / "killed"),
    }


def fail_in_the_first_process(model: Any, count: int, *_: Any) -> Any:
    """In place of `score_scenes`: generates a caption in the first process, and raises an error there."""
    model.captioner([scene.picture for scene in scenes(count, split="heldout", seed=1)][:1])
    raise DataError("a picture that opens in one process only")


def validated(root: Path) -> dict[str, Any]:
    """Runs with validations: of one process, of two with sharded parameters, and of two that are killed and resumed."""

    def run(recipe: str, out: str, **options: Any) -> None:
        train("stage2", root / f"{recipe}.toml", root / out, evaluation_scenes=0, **options)

    ends = {"one": [wait(fork(partial(run, "validated-one", "validated-one")))]}
    ends["two"] = pair(partial(run, "validated-two", "validated-two"))
    ends["killed"] = pair(partial(run, "validated-two", "validated-killed", progress=killing(3)))
    ends["resumed"] = pair(partial(run, "validated-two", "validated-killed"))

    def failing() -> None:
        if os.environ["RANK"] == "0":
            vars(validations)["score_scenes"] = fail_in_the_first_process
        run("validated-two", "validated-failed")

    ends["failed"] = pair(failing)
    names = ("validated-one", "validated-two", "validated-killed")
    records = [json.loads((root / name / "training.json").read_text())["phases"]["stage2"] for name in names]
    weights = [load_file(root / name / "model.safetensors") for name in names]
    return {
        "ends": ends,
        "scores": [[line["validation"] for line in log(root / name) if "validation" in line] for name in names],
        "best": [record["validation"] for record in records],
        "difference": difference(*weights[:2]),
        "same": hashes(root / names[1]) == hashes(root / names[2]),
    }


def main() -> None:
    torch.set_num_threads(1)
    vars(runs)["draw_curve"] = lambda lines, path: False
    root = Path(sys.argv[1])
    print(json.dumps({"families": families(root), "recipes": recipes_of(root), "validated": validated(root)}))


if __name__ == "__main__":
    main()
