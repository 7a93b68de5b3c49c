"""A step of part 2 of ``gpu.py``: captions with a model of published size, against transformers.

``gpu_prepare.py`` exports the model once, on another machine, and packs the graphs without the weights
(``gpu_skeleton.py``). Without these files, the step exports the model itself, which takes minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_common import (
    MODEL,
    ROUNDS,
    TOKENS,
    TRUE_SIZE,
    compiled_options,
    cuda_sessions,
    peer_caption,
    peer_model,
    picture,
    prepared,
    synchronize,
)
from gpu_cuda import bandwidth
from gpu_onnxruntime import overlapped
from gpu_skeleton import LEAST, fill, pack
from random_checkpoint import published, shrunk, write_checkpoint

FORCED: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "draft": "none"}
OURS = {"cuda": "0", "cuda with graphs": "1"}
"""This project's backend, without and with CUDA graphs: the value of the variable that switches them on."""

PICTURES = 16  # captioned to measure the overlap


def make_packed(folder: Path, dry: bool = False) -> None:
    """Exports a model of published size in fp16, makes its copy for CUDA, and packs both into a folder.

    The outputs of the copy are not compared, which would need the graphs in FP32 in memory; tests compare them with
    small models. In a dry run the model is tiny.
    """
    from blip2edge.export.pipeline import export_checkpoint
    from blip2edge.optimization import by_rule
    from blip2edge.optimization.pipeline import optimize

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, bundle = Path(scratch) / "checkpoint", Path(scratch) / "bundle"
        write_checkpoint(checkpoint, shrunk(published(MODEL)) if dry else published(MODEL), torch.float16)
        export_checkpoint(checkpoint, bundle, precision="fp16")
        with mock.patch.object(by_rule, "_run", return_value={}):
            optimize(bundle, "cuda")
        pack(bundle, folder, 1 << 10 if dry else LEAST)


def true_size(dry: bool) -> dict[str, Any]:
    """Times blip2edge and transformers in turn (A B A B), preprocessing included, and compares with the bandwidth.

    ``seconds`` has the seconds of each round. ``share_of_bandwidth``: the decoder's weights, which are read once for
    each token, over the time of a decode step, as a share of the bandwidth of a copy. ``times_eager`` and
    ``times_compiled``: the median of the ratios within a round, of the fastest of this project's settings. ``left``:
    graphs without an optimized copy, with the reason. ``overlap``: as the step of that name, in this size.
    ``equal_tokens`` (and so ``ok``): whether all tokens are equal with and without CUDA graphs, which run the same
    kernels.
    """
    found: dict[str, Any] = {}

    def report(**values: Any) -> None:
        """Prints what has been measured so far: it is kept if the step does not finish."""
        found.update(values)
        print(json.dumps(found), flush=True)

    report(bandwidth=bandwidth(dry))
    with (
        prepared(TRUE_SIZE, dry, lambda folder: make_packed(folder / "packed", dry)) as source,
        tempfile.TemporaryDirectory() as scratch,
        cuda_sessions(dry),
        ExitStack() as opened,
    ):
        packed, start = source / "packed", time.perf_counter()
        size = fill(packed, Path(scratch) / "bundle")
        report(weight_bytes=size, fill_s=time.perf_counter() - start)
        captioners = _ours(Path(scratch) / "bundle", opened, report)
        image = picture()
        calls: dict[str, Callable[[], Any]] = {
            name: partial(captioner.caption, image, **FORCED) for name, captioner in captioners.items()
        }
        model, inputs = peer_model(dry)
        calls["eager"] = peer_caption(model, inputs, image)
        report(**_race(calls, found["decoder_bytes"], found["bandwidth"]["gigabytes_per_s"], dry))
        report(ok=found["equal_tokens"])
        report(overlap=overlapped(captioners["cuda"], 4 if dry else PICTURES, dry))
        calls["compiled"] = peer_caption(model, inputs, image, **compiled_options(dry))
        report(**_race(calls, found["decoder_bytes"], found["bandwidth"]["gigabytes_per_s"], dry))
        report(ok=found["ok"] and found["equal_tokens"])  # in both races
    return found


def _ours(bundle: Path, opened: ExitStack, report: Callable[..., None]) -> dict[str, Any]:
    """Loads the bundle with each setting of :data:`OURS`; returns the captioners, which ``opened`` closes."""
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.schema import DECODER
    from blip2edge.runtime.backends.onnxruntime_cuda import GRAPHS_VARIABLE
    from blip2edge.runtime.backends.optimized_copy import read_copy
    from blip2edge.runtime.captioning.captioner import Captioner

    known = Bundle.open(bundle)
    copy = read_copy(known, "cuda")
    report(
        decoder_bytes=known.manifest.graph_bytes(known.graph(DECODER)),
        left={"all graphs": "no copy can be used"} if copy is None else dict(copy[1].left),
    )
    captioners, load_s = {}, {}
    for name, value in OURS.items():
        os.environ[GRAPHS_VARIABLE] = value  # read when the decoder is loaded
        start = time.perf_counter()
        captioners[name] = opened.enter_context(Captioner.load(bundle, backend="cuda"))
        load_s[name] = time.perf_counter() - start
        report(load_s=load_s)
    return captioners


def _race(calls: dict[str, Callable[[], Any]], weights: int, gigabytes_per_s: float, dry: bool) -> dict[str, Any]:
    """Calls all functions in turn, after two rounds that warm up; returns the measured values of :func:`true_size`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    decode_ms: dict[str, list[float]] = {name: [] for name in calls if name in OURS}
    tokens: dict[str, Any] = {}
    for number in range(4 if dry else ROUNDS + 2):
        for name, call in calls.items():
            synchronize(dry)
            start = time.perf_counter()
            result = call()
            synchronize(dry)
            if number > 1:  # the first run allocates, the second one captures CUDA graphs
                seconds[name].append(time.perf_counter() - start)
                if name in OURS:
                    decode_ms[name].append(result.timings_ms["decode"])
            if name in OURS:
                tokens[name] = result.tokens
    per_token = {name: statistics.median(values) / (TOKENS - 1) for name, values in decode_ms.items()}
    best = min(OURS, key=lambda name: statistics.median(seconds[name]))
    times = {
        f"times_{peer}": statistics.median(b / a for a, b in zip(seconds[best], seconds[peer], strict=True))
        for peer in calls
        if peer not in OURS
    }
    return {
        "seconds": seconds,
        "fastest": best,
        **times,
        "decode_ms_per_token": per_token,
        "share_of_bandwidth": {name: weights / ms / 1e6 / gigabytes_per_s for name, ms in per_token.items()},
        "equal_tokens": len(set(tokens.values())) == 1,
    }
