"""How much memory an export takes at true size: ``python benchmarks/export_memory.py blip2-opt-2.7b``.

Writes a checkpoint of the named size with random fp16 weights (shard by shard, itself in little memory), exports
it in a process of its own, and samples RssAnon + RssShmem over that process and its children. ``--depth 0.5`` halves
every stack, to show that the need does not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families import read_config, weight_map

SIZES: dict[str, dict[str, Any]] = {
    "blip2-opt-2.7b": {
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "image_token_index": 50265,
        "vision_config": {},
        "qformer_config": {},
        "text_config": {
            "model_type": "opt",
            "vocab_size": 50304,
            "hidden_size": 2560,
            "ffn_dim": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "eos_token_id": 50118,
        },
    },
}
"""config.json of the published checkpoints; what is left out is transformers' default."""

SHARD = 1 << 30  # bytes
INTERVAL = 0.02  # seconds between two samples


def scaled(config: dict[str, Any], depth: float) -> dict[str, Any]:
    """The same widths with ``depth`` times the layers."""
    defaults = {"vision_config": 39, "qformer_config": 12, "text_config": 32}
    out = json.loads(json.dumps(config))
    for section, layers in defaults.items():
        count = out[section].get("num_hidden_layers", layers)
        out[section]["num_hidden_layers"] = max(1, round(count * depth))
    return dict(out)


def random_tensors(config: CaptionerConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors, one at a time, from one block of random numbers that is read at moving offsets."""
    with torch.device("meta"):
        shapes = CaptionerModel(config).shapes()
    noise = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0))
    names, seen = weight_map(config), set()
    for ours, shape in shapes.items():
        (name,) = names.sources(ours)
        if name in seen:
            continue
        seen.add(name)
        count = int(torch.Size(shape).numel())
        fan_in = max(1, count // shape[0]) if len(shape) > 1 else 1
        scale = fan_in**-0.5 if len(shape) > 1 else 0.1
        values = (noise * scale).half().repeat(count // len(noise) + 1)[:count].reshape(shape)
        yield name, values + 1 if "norm" in name.lower() and name.endswith("weight") else values


def write_checkpoint(directory: Path, config: dict[str, Any]) -> int:
    """Writes sharded safetensors, config, tokenizer and preprocessing; returns the bytes of the weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    held = total = number = 0

    def flush() -> None:
        nonlocal shard, held, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard, held = {}, 0

    for name, tensor in random_tensors(read_config(config)):
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        total += tensor.nbytes
        if held > SHARD:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    size = config["vision_config"].get("image_size", 224)
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BlipImageProcessor", "size": {"height": size, "width": size}})
    )
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "photo", "of"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])  # type: ignore[assignment]
    tokenizer.save(str(directory / "tokenizer.json"))
    return total


def tree_bytes(root: int) -> int:
    """RssAnon + RssShmem of a process and all its descendants, in bytes."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    tree, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree |= more
        grown = bool(more)
    return sum(map(own_bytes, tree))


def own_bytes(pid: int) -> int:
    """RssAnon + RssShmem of one process, in bytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def measure(checkpoint: Path, bundle: Path, precision: str) -> dict[str, float]:
    """Exports in a process of its own; seconds and the peak in bytes."""
    command = [sys.executable, "-m", "blip2edge", "export", str(checkpoint), "-o", str(bundle)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--precision", precision, "--verify", "sample"])
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak}


def main() -> None:
    """Writes, exports, and prints one line a depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument(
        "--depth", type=float, action="append", help="share of the layers; may be repeated (1.0 and 0.5)"
    )
    parser.add_argument("--precision", default="fp16")
    parser.add_argument(
        "--work", type=Path, help="where checkpoint and bundle are written, about 4 times the weights"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    results = []
    for depth in options.depth or [1.0, 0.5]:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            checkpoint = Path(folder) / "checkpoint"
            weights = write_checkpoint(checkpoint, scaled(SIZES[options.size], depth))
            figures = measure(checkpoint, Path(folder) / "bundle", options.precision)
        results.append({"depth": depth, "weight_bytes": weights, **figures})
        print(
            f"{options.size} x {depth:g}, {options.precision}: weights {weights / 1e9:.2f} GB, "
            f"peak RssAnon + RssShmem {figures['peak_bytes'] / 1e9:.2f} GB, {figures['seconds']:.0f} s",
            flush=True,
        )
    if options.json:
        packages = ("torch", "onnx", "onnxruntime", "onnxscript")
        machine = {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        document = {
            "command": "python benchmarks/export_memory.py " + " ".join(sys.argv[1:]),
            "machine": machine | {name: version(name) for name in packages},
            "size": options.size,
            "precision": options.precision,
            "results": results,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
