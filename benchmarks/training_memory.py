"""Predicts the peak memory of a training step (stage 2) for published models, and checks it on models a tenth as large.

    python benchmarks/training_memory.py --json benchmarks/results/training-memory.json

The first measurement is in float32. The next ones add options that save memory, one by one: frozen modules in bfloat16;
activation checkpointing; LoRA on the attentions; parameters sharded over two processes. For each combination,
`training/setup/memory.py` predicts the peak of a step for a published model, and for a smaller model of the same family
with random weights. The smaller model then makes three steps, in a new process for each combination. The largest
resident memory of the second and third step is read from /proc (Linux), minus the memory before the model was built.
The weights, the batch and the seed are equal for all combinations, so that the losses can be compared. Environment
variables make malloc return freed memory.

The file is written after each measurement. If a run was interrupted, the same command continues it; remove the file to
measure again.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting import ROOT, command, machine, parser_of, python, write_json

from blip2edge.cli import run_script

if TYPE_CHECKING:
    from blip2edge.model.config import CaptionerConfig

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
CHOICES = {
    "float32": ("", ""),
    "frozen parts in bfloat16": ('frozen_dtype = "bfloat16"', ""),
    "+ checkpointing": ('frozen_dtype = "bfloat16"\nrecompute_activations = true', ""),
    "+ LoRA of rank 8": ('frozen_dtype = "bfloat16"\nrecompute_activations = true', "lora_rank = 8"),
    "+ FSDP, 2 processes": ('frozen_dtype = "bfloat16"\nrecompute_activations = true\nfsdp = true', "lora_rank = 8"),
}
VISION = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 20, "num_attention_heads": 10}
QFORMER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
           "encoder_hidden_size": 640}  # fmt: skip
TENTHS: dict[str, dict[str, int]] = {
    "blip2-opt-2.7b": {"hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096, "num_hidden_layers": 16,
                       "num_attention_heads": 16},
    "instructblip-vicuna-7b": {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 26,
                               "num_attention_heads": 10, "num_key_value_heads": 10},
}  # fmt: skip
"""Sizes of the language models that are a tenth as large as the published models, by the published model's name.

`VISION` and `QFORMER` have the sizes of the vision encoder and the Q-Former that belong to them.
"""
ROWS, SMALL_ROWS, TOKENS, STEPS = 16, 4, 32, 3


def values_of(name: str, *, small: bool) -> dict[str, Any]:
    """Returns the ``config.json`` of a published model, or of the smaller model of the same family."""
    from blip2edge.shapes.families import published_config

    values: dict[str, Any] = json.loads(json.dumps(published_config(name)))
    if small:
        for section, sizes in (("vision_config", VISION), ("qformer_config", QFORMER), ("text_config", TENTHS[name])):
            values[section] |= sizes
    return values


def config_of(name: str, *, small: bool) -> CaptionerConfig:
    """Returns the configuration of a published captioner, or of the smaller one of the same family."""
    from blip2edge.model.config import CaptionerConfig
    from blip2edge.model.families.registry import read_config

    config = read_config(values_of(name, small=small))
    assert isinstance(config, CaptionerConfig)
    return config


def recipe_of(choice: str, rows: int) -> Any:
    """Returns the training recipe with the options that ``choice`` names, a key of ``CHOICES``."""
    from blip2edge.training.config import parse_config

    loop, stage2 = CHOICES[choice]
    return parse_config(
        f'[model]\ncheckpoint = "x"\n[loop]\n{loop}\n[stage2]\nbatch_size = {rows}\nmax_tokens = {TOKENS}\n{stage2}'
    )


def predicted(name: str, choice: str, *, small: bool) -> dict[str, int]:
    """Returns the predicted memory of one process in bytes, by the kind of use (weights, gradients, and so on)."""
    from blip2edge.training.setup.memory import predict

    recipe = recipe_of(choice, SMALL_ROWS if small else ROWS)
    found = predict(config_of(name, small=small), recipe, recipe.stage2, 2)
    return {**asdict(found), "step": found.step, "peak": found.peak}


def resident(field: str) -> int:
    """Returns a value of /proc/self/status in bytes, such as VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def settle() -> int:
    """Gives freed memory back to the system and resets the recorded peak; returns the resident memory in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def measure(name: str, choice: str) -> dict[str, Any] | None:
    """Makes the training steps with one combination of options, in this process.

    Returns the losses and the peak memory; in a run with several processes, only in the first process, else None.
    """
    import peft
    import torch
    import torch._dynamo
    from accelerate import Accelerator
    from torch import nn

    from blip2edge.model.captioner import CaptionerModel
    from blip2edge.training.loop.optim import make_optimizer, recompute_activations
    from blip2edge.training.loop.sharding import clip_gradients, shard, views_allowed
    from blip2edge.training.phases.stage2 import GenerativeStage
    from blip2edge.training.setup import memory
    from blip2edge.training.setup.lora import add_lora
    from blip2edge.training.setup.model_parts import DTYPES

    del peft  # like _dynamo, which the optimizer imports: loaded before the memory is measured
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()  # what torch allocates once
    config, recipe = config_of(name, small=True), recipe_of(choice, SMALL_ROWS)
    phase, loop = recipe.stage2, recipe.loop
    before = settle()
    torch.manual_seed(0)
    model = CaptionerModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    model.vision.to(DTYPES[loop.frozen_dtype]).requires_grad_(False)
    model.language.to(DTYPES[loop.frozen_dtype])
    if phase.lora_rank:
        add_lora(model.language, phase.lora_rank, phase.lora_alpha, phase.lora_targets)
    stage = GenerativeStage(model).eval()  # without dropout, so that all losses can be compared
    if loop.recompute_activations:
        recompute_activations(stage)
    sharding = shard(accelerator, (stage, model.vision)) if loop.fsdp else None
    optimizer = make_optimizer([stage], phase)
    torch.manual_seed(1)
    batch = memory._batch(stage, config, recipe, phase)
    assert batch.captions is not None
    ids = torch.randint(4, 5000, batch.captions.input_ids.shape)
    captions = batch.captions._replace(input_ids=ids, labels=ids)
    batch = batch._replace(image_embeds=torch.randn(batch.image_embeds.shape), captions=captions)
    losses, peaks = [], []
    with views_allowed():
        for _ in range(STEPS):
            settle()
            loss = stage(batch)["loss"]
            loss.backward()
            if sharding is not None:
                sharding.sync_scalars()
                clip_gradients(stage, phase.clip_norm)
            else:
                torch.nn.utils.clip_grad_norm_(stage.parameters(), phase.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            peaks.append(resident("VmHWM") - before)
    return {"losses": losses, "peak": max(peaks[1:])} if accelerator.is_main_process else None


def measured(name: str, choice: str) -> dict[str, Any]:
    """Runs :func:`measure` in new processes; returns its losses and peak memory."""
    own = [str(Path(__file__)), "--one", name, choice]
    several = "fsdp" in CHOICES[choice][0]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *own] if several else own
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *start], check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def row_of(name: str, choice: str, known: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Returns the table row of one combination of options.

    The row has the predicted peak memory of the published model and of the smaller model. If the file already has a
    measurement of the smaller model, made with the same prediction, the row has this measurement, too.
    """
    small = predicted(name, choice, small=True)
    row = {"choice": choice, "predicted": predicted(name, choice, small=False), "small": small}
    earlier = known.get((name, choice), {})
    same = earlier.get("small") == small
    return {
        **row,
        "measured": earlier.get("measured") if same else None,
        "error": earlier.get("error") if same else None,
    }


def kept_rows(path: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the rows that an earlier call wrote, by model and by the name of the combination of options."""
    if path is None or not path.exists():
        return {}
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    return {(model["model"], row["choice"]): row for model in models for row in model["rows"]}


def main() -> None:
    """Predicts and measures all combinations of options, for each published model and its smaller version."""
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "CHOICE"), help="measure one combination in this process")
    options = parser.parse_args()
    if options.one:
        found = measure(*options.one)
        if found is not None:
            print(json.dumps(found), flush=True)
        return
    document = {
        "command": command(),
        "machine": machine(),
        "versions": python("torch"),
        "batch": ROWS,
        "small_batch": SMALL_ROWS,
        "tokens": TOKENS,
    }
    known = kept_rows(options.json)
    rows = {name: [row_of(name, choice, known) for choice in CHOICES] for name in TENTHS}
    models = [{"model": name, "rows": of_model} for name, of_model in rows.items()]
    for name, of_model in rows.items():
        for row in of_model:
            if row["measured"] is None:
                run = row["measured"] = measured(name, row["choice"])
                row["error"] = round(row["small"]["step"] / run["peak"] - 1, 4)
                print(name, row["choice"], row["error"], run, file=sys.stderr, flush=True)
                write_json(options.json, {**document, "models": models})


if __name__ == "__main__":
    run_script(main)
