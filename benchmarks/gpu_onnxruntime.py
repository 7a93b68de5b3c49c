"""Part 2 of the steps of ``gpu.py``: ONNX Runtime's CUDA provider, and copies made by ``optimize --backend cuda``."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from gpu_common import MODEL, ROUNDS, TOKENS, peer_model, picture, seconds_of, synchronize
from gpu_cuda import bandwidth
from random_checkpoint import published, shrunk, write_checkpoint
from reporting import ROOT


def bundles(folder: Path, precisions: tuple[str, ...]) -> dict[str, Path]:
    """Exports the example checkpoint in the given precisions, and calibrates ``int4``; returns the bundles."""
    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.export.pipeline import export_checkpoint

    made: dict[str, Path] = {}
    for precision in precisions:
        if precision == "int4":
            pictures = ROOT / "examples" / "pictures"
            report = calibrate(made["fp16"], folder / "int4", images=pictures, activations=(), weights="int4")
            made["int4"] = report.bundle
        else:
            checkpoint = ROOT / "examples" / "checkpoint"
            made[precision] = export_checkpoint(checkpoint, folder / precision, precision=precision).bundle
    return made


def provider(dry: bool) -> dict[str, Any]:
    """Compares the token ids of ONNX Runtime on CUDA and on the CPU, and lists the provider that runs each node."""
    from blip2edge.optimization.pipeline import optimize
    from blip2edge.runtime.captioning.captioner import Captioner

    pictures = [PIL.Image.open(path) for path in sorted((ROOT / "examples" / "pictures").glob("*.png"))]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision, bundle in bundles(Path(folder), ("fp32", "fp16", "int4")).items():
            for form in ("portable", "copy"):
                if form == "copy":
                    optimize(bundle, "cuda")
                tokens = []
                nodes: dict[str, Any] = {}
                for backend in ("cpu", "cpu" if dry else "cuda"):
                    with Captioner.load(bundle, backend=backend) as captioner:
                        results = captioner.caption_many(pictures, draft="none", max_new_tokens=TOKENS)
                        tokens.append([one.tokens for one in results])
                        vision = captioner.encoder.images.vision
                        nodes = dict(getattr(vision, "nodes", {}))
                equal = sum(one == two for one, two in zip(*tokens, strict=True))
                found[f"{precision} {form}"] = {"equal": equal, "of": len(pictures), "vision_nodes": nodes}
    return {"captions": found, "ok": all(one["equal"] == one["of"] for name, one in found.items() if "fp32 p" in name)}


def cuda_graphs(dry: bool) -> dict[str, Any]:
    """Times the optimized decoder with and without CUDA graphs of its steps, in turn; compares the tokens of both."""
    from blip2edge.optimization.pipeline import optimize
    from blip2edge.runtime.backends.onnxruntime_cuda import GRAPHS_VARIABLE
    from blip2edge.runtime.captioning.captioner import Captioner

    options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "draft": "none"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        bundle = bundles(Path(folder), ("fp16",))["fp16"]
        optimize(bundle, "cuda")
        captioners = {}
        for name, value in {"off": "0", "on": "1"}.items():
            os.environ[GRAPHS_VARIABLE] = value  # read when the decoder is loaded
            captioner = Captioner.load(bundle, backend="cpu" if dry else "cuda")
            captioners[name] = opened.enter_context(captioner)
        tokens: dict[str, tuple[int, ...]] = {}
        decode_ms: dict[str, list[float]] = {name: [] for name in captioners}
        for number in range(3 if dry else 4 * ROUNDS):
            for name, captioner in captioners.items():
                result = captioner.caption(picture(), **options)
                tokens[name] = result.tokens
                if number > 1:  # the first run warms up, the second one captures
                    decode_ms[name].append(result.timings_ms["decode"])
    medians = {name: statistics.median(found) for name, found in decode_ms.items()}
    equal = tokens["off"] == tokens["on"]
    return {"decode_ms": medians, "ratio": medians["off"] / medians["on"], "equal_tokens": equal, "ok": equal}


def true_size(dry: bool) -> dict[str, Any]:
    """Times blip2edge and eager transformers in turn (A B A B), with a model of the published size."""
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.schema import DECODER
    from blip2edge.export.pipeline import export_checkpoint
    from blip2edge.optimization.pipeline import optimize
    from blip2edge.runtime.captioning.captioner import Captioner

    config = shrunk(published(MODEL)) if dry else published(MODEL)
    times: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_checkpoint(Path(folder) / "checkpoint", config, torch.float32 if dry else torch.float16)
        times["checkpoint_s"] = time.perf_counter() - start
        start = time.perf_counter()
        precision = "fp32" if dry else "fp16"
        bundle = export_checkpoint(Path(folder) / "checkpoint", Path(folder) / "bundle", precision=precision).bundle
        times["export_s"] = time.perf_counter() - start
        start = time.perf_counter()
        optimize(bundle, "cuda")
        times["copy_s"] = time.perf_counter() - start
        model, inputs = peer_model(dry)
        forced: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        with Captioner.load(bundle, backend="cpu" if dry else "cuda") as captioner, torch.inference_mode():
            calls: dict[str, Callable[[], Any]] = {
                "ours": lambda: captioner.caption(picture(), draft="none", **forced),
                "eager": lambda: model.generate(**inputs, **forced, do_sample=False),
            }
            rounds: dict[str, list[float]] = {name: [] for name in calls}
            for number in range(3 if dry else ROUNDS + 1):
                for name, call in calls.items():
                    synchronize(dry)
                    start = time.perf_counter()
                    call()
                    synchronize(dry)
                    if number:
                        rounds[name].append(time.perf_counter() - start)
            decode_ms = captioner.caption(picture(), draft="none", **forced).timings_ms["decode"]
            opened = Bundle.open(bundle)
            weights = opened.manifest.graph_bytes(opened.graph(DECODER))
        ratio = statistics.median(b / a for a, b in zip(rounds["ours"], rounds["eager"], strict=True))
        per_token = decode_ms / (TOKENS - 1)
        return {
            **times,
            "seconds": rounds,
            "times_eager": ratio,
            "decode_ms_per_token": per_token,
            "decoder_bytes": weights,
            "gigabytes_per_s_of_weights": weights / per_token / 1e6,
            "bandwidth": bandwidth(dry),
        }


def overlap(dry: bool) -> dict[str, Any]:
    """Measures pictures per second without and with the scheduler, which encodes pictures while others are decoded."""
    from blip2edge.runtime.captioning.captioner import Captioner

    with tempfile.TemporaryDirectory() as folder:
        bundle = bundles(Path(folder), ("fp32",))["fp32"]
        count = 8 if dry else 64
        pictures = [picture()] * count
        with Captioner.load(bundle, backend="cpu" if dry else "cuda") as captioner:
            options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "draft": "none"}
            together = min(seconds_of(lambda: list(captioner.caption_many(pictures, **options)), dry, 3))
            alone = min(seconds_of(lambda: [captioner.caption(one, **options) for one in pictures], dry, 3))
    return {"pictures": count, "one_by_one_s": alone, "scheduler_s": together, "ratio": alone / together}
