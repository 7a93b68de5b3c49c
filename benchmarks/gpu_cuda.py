"""Part 1 of the steps of ``gpu.py``: CUDA itself, this project's runtime on CUDA, and transformers for comparison."""

from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np
import PIL.Image
import torch
from gpu_bundles import example_bundles
from gpu_common import (
    DEVICES,
    MIB,
    ROUNDS,
    TOKENS,
    compiled_options,
    peer_caption,
    peer_model,
    picture,
    seconds_of,
)
from reporting import ROOT, versions


def machine(dry: bool) -> dict[str, Any]:
    """Describes the GPU, its driver, and the packages."""
    from blip2edge.packages import installed
    from blip2edge.runtime.backends.probe import nvidia_driver

    driver = nvidia_driver()
    packages = ("onnxruntime", "cuda-bindings", "tensorrt", "transformers", "onnx")
    return {
        "driver": driver.version,
        "gpus": [vars(gpu) for gpu in driver.gpus],
        "torch": versions("torch")["torch"],
        "cuda_of_torch": "" if dry else torch.version.cuda,
        **{name: found for name in packages if (found := installed(name))},
    }


def bandwidth(dry: bool) -> dict[str, Any]:
    """Measures the memory bandwidth of the GPU by a copy, in bytes per second.

    Each copied byte counts twice, because it is read and written.
    """
    size = 16 * MIB if dry else 2048 * MIB
    source = torch.ones(size, dtype=torch.uint8, device=DEVICES[dry])
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), dry))
    return {"bytes": 2 * size, "seconds": best, "gigabytes_per_s": 2 * size / best / 1e9}


def cuda_layer(dry: bool) -> dict[str, Any]:
    """Checks ``runtime/cuda``, the code over cuda-bindings: copies in both directions, events, and graph capture.

    A capture that fails is checked as well.
    """
    from blip2edge.runtime.tensorrt.cuda import Cuda, DeviceBuffer, Mirror, load_cuda

    if dry:
        from tests.engine.fake_gpu import FakeCuda

        cuda = Cuda(FakeCuda())
    else:
        cuda = Cuda(load_cuda())
    stream, checks = cuda.stream(), {}
    values = np.arange(1000, dtype=np.float32)
    first, second = (Mirror(cuda, (1000,), values.dtype, on_device=own) for own in (False, True))
    first.put(values, stream)
    cuda.copy(second.address, first.address, values.nbytes, stream)
    back = second.fetch((1000,), stream)
    cuda.synchronize(stream)
    checks["copies"] = bool((back == values).all())
    event = cuda.event()
    cuda.zero(second.address, values.nbytes, stream)
    cuda.record(event, stream)
    cuda.wait(event)
    back = second.fetch((1000,), stream)
    cuda.synchronize(stream)
    checks["zero_and_event"] = bool((back == 0).all())
    graph = cuda.capture(stream, lambda: cuda.copy(second.address, first.address, values.nbytes, stream))
    first.put(values + 1, stream)
    cuda.launch(graph, stream)
    back = second.fetch((1000,), stream)
    cuda.synchronize(stream)
    checks["captured_copy"] = bool((back == values + 1).all())

    def fail() -> None:
        cuda.zero(second.address, 4, stream)
        raise RuntimeError("an error during the capture")

    try:
        cuda.capture(stream, fail)
    except RuntimeError:
        first.put(values + 2, stream)
        cuda.copy(second.address, first.address, values.nbytes, stream)
        back = second.fetch((1000,), stream)
        cuda.synchronize(stream)
        checks["stream_after_a_failed_capture"] = bool((back == values + 2).all())
    cuda.destroy_graph(graph)
    cuda.destroy_event(event)
    for buffer in (first, second, DeviceBuffer(cuda, MIB)):
        buffer.free()
    cuda.destroy_stream(stream)
    return {"checks": checks, "ok": all(checks.values()), "shares_memory": cuda.shares_memory}


def captured_torch(dry: bool) -> dict[str, Any]:
    """Captures a torch matrix multiplication as a CUDA graph on a stream of ``runtime/cuda``, and replays the graph.

    The replay reads another input than the one that was captured.
    """
    if dry:
        return {"ok": True, "difference": 0.0, "note": "needs a GPU"}
    from blip2edge.runtime.tensorrt.cuda import Cuda, load_cuda

    cuda = Cuda(load_cuda())
    handle = cuda.stream()
    stream = torch.cuda.ExternalStream(handle)
    weight = torch.randn(2560, 2560, device="cuda", dtype=torch.float16)
    given, result = torch.randn(1, 2560, device="cuda", dtype=torch.float16), torch.empty(1, 2560, device="cuda").half()

    def work() -> None:
        with torch.cuda.stream(stream):
            torch.mm(given, weight, out=result)

    work()
    cuda.synchronize(handle)
    graph = cuda.capture(handle, work)
    torch.cuda.synchronize()
    given.copy_(torch.randn(1, 2560, device="cuda", dtype=torch.float16))
    torch.cuda.synchronize()
    cuda.launch(graph, handle)
    cuda.synchronize(handle)
    wanted = torch.mm(given, weight)
    difference = float((wanted.float() - result.float()).abs().max() / wanted.float().abs().max())
    return {"ok": difference < 1e-2, "difference": difference}  # another stream may have another kernel


def runtime(dry: bool) -> dict[str, Any]:
    """Runs this project's TensorRT runtime on real CUDA, with ONNX Runtime on the CPU in place of the engines.

    So memory, copies, streams and events are tested on the GPU. The tokens must equal those of the CPU backend.
    """
    from blip2edge.runtime.backends.engine_files import KIND
    from blip2edge.runtime.captioning.captioner import Captioner
    from tests.engine import fake_engines, host_engines

    with example_bundles(dry, ("fp32",), copies=False) as bundles, host_engines.Patches() as patches:
        bundle = bundles["fp32"]
        if dry:
            fake_engines.plug_in(patches)
        else:
            host_engines.plug_in(patches)
        fake_engines.write_engines(bundle, bundle / KIND)
        pictures = [PIL.Image.open(path) for path in sorted((ROOT / "examples" / "pictures").glob("*.png"))]
        options: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"repetition_penalty": 1.3, "min_new_tokens": 12}]
        equal = {}
        for given in options:
            tokens = []
            for backend in ("cpu", "tensorrt"):
                with Captioner.load(bundle, backend=backend, threads=1) as captioner:
                    tokens.append([one.tokens for one in captioner.caption_many(pictures, batch_size=4, **given)])
            equal[json.dumps(given)] = tokens[0] == tokens[1]
    return {"equal_tokens": equal, "ok": all(equal.values())}


def peer(dry: bool, **generation: Any) -> dict[str, Any]:
    """Measures the seconds of a caption of `TOKENS` tokens with transformers: preprocessing, then ``generate``."""
    model, inputs = peer_model(dry)
    found = seconds_of(peer_caption(model, inputs, picture(), **generation), dry, 2 if dry else ROUNDS)
    weights = sum(tensor.nbytes for tensor in model.language_model.parameters())
    return {
        "seconds": found,
        "milliseconds": statistics.median(found) * 1e3,
        "tokens": TOKENS,
        "language_model_bytes": weights,
    }


def compiled(dry: bool) -> dict[str, Any]:
    """Times transformers with a static KV cache, which compiles the decode step with ``reduce-overhead`` on a GPU."""
    return peer(dry, **compiled_options(dry))
