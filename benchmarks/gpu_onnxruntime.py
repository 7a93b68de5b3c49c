"""Part 2 of the steps of ``gpu.py``: ONNX Runtime's CUDA provider, and copies made by ``optimize --backend cuda``.

``gpu_true_size.py`` has another step of this part.
"""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from typing import Any

import PIL.Image
from gpu_bundles import PRECISIONS, example_bundles
from gpu_common import ROUNDS, TOKENS, cuda_sessions, picture, seconds_of
from reporting import ROOT


def provider(dry: bool) -> dict[str, Any]:
    """Compares the token ids of ONNX Runtime on CUDA and on the CPU, and lists the provider that runs each node.

    ``equal`` counts pictures with equal tokens. ``nodes`` has, for each graph and provider, the number of nodes of each
    operator. In fp32 the tokens of the exported (portable) graphs must be equal.
    """
    from blip2edge.runtime.captioning.captioner import Captioner

    pictures = [PIL.Image.open(path) for path in sorted((ROOT / "examples" / "pictures").glob("*.png"))]
    found: dict[str, Any] = {}
    with example_bundles(dry, PRECISIONS) as bundles:
        for precision, bundle in bundles.items():
            copy, aside = bundle / "optimized", bundle.parent / f"{precision}-optimized"
            for form in ("portable", "copy"):
                copy.rename(aside) if form == "portable" else aside.rename(copy)
                tokens = []
                with cuda_sessions(dry) as sessions:
                    for backend in ("cpu", "cuda"):
                        with Captioner.load(bundle, backend=backend) as captioner:
                            results = captioner.caption_many(pictures, draft="none", max_new_tokens=TOKENS)
                            tokens.append([one.tokens for one in results])
                    nodes = {graph: session.nodes for graph, session in sessions.items()}
                equal = sum(one == two for one, two in zip(*tokens, strict=True))
                found[f"{precision} {form}"] = {"equal": equal, "of": len(pictures), "nodes": nodes}
    return {"captions": found, "ok": found["fp32 portable"]["equal"] == len(pictures)}


def cuda_graphs(dry: bool) -> dict[str, Any]:
    """Times the optimized decoder with and without CUDA graphs of its steps, in turn; compares the tokens of both."""
    from blip2edge.runtime.backends.onnxruntime_cuda import GRAPHS_VARIABLE
    from blip2edge.runtime.captioning.captioner import Captioner

    options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "draft": "none"}
    with example_bundles(dry, ("fp16",)) as bundles, cuda_sessions(dry), ExitStack() as opened:
        captioners = {}
        for name, value in {"off": "0", "on": "1"}.items():
            os.environ[GRAPHS_VARIABLE] = value  # read when the decoder is loaded
            captioner = Captioner.load(bundles["fp16"], backend="cuda")
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


def overlap(dry: bool) -> dict[str, Any]:
    """Measures pictures per second without and with the scheduler, which encodes pictures while others are decoded.

    Pictures are not batched, so the difference comes from the overlap alone.
    """
    from blip2edge.runtime.captioning.captioner import Captioner

    count = 8 if dry else 64
    with (
        example_bundles(dry, ("fp32",), copies=False) as bundles,
        cuda_sessions(dry),
        Captioner.load(bundles["fp32"], backend="cuda") as captioner,
    ):
        return overlapped(captioner, count, dry)


def overlapped(captioner: Any, count: int, dry: bool) -> dict[str, Any]:
    """Captions ``count`` pictures one after another, and with the scheduler, in turn (A B A B).

    Returns the median seconds of both, and the median of the ratios within a round.
    """
    pictures = [picture()] * count
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "draft": "none"}
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(3):
        one = seconds_of(lambda: [captioner.caption(image, **options) for image in pictures], dry, 1)
        two = seconds_of(lambda: list(captioner.caption_many(pictures, batch_size=1, **options)), dry, 1)
        seconds["alone"] += one
        seconds["together"] += two
    ratio = statistics.median(one / two for one, two in zip(seconds["alone"], seconds["together"], strict=True))
    alone, together = (statistics.median(seconds[name]) for name in ("alone", "together"))
    return {"pictures": count, "one_by_one_s": alone, "scheduler_s": together, "ratio": ratio}
