"""The steps of ``gpu.py``. ``python benchmarks/gpu_steps.py STEP`` runs one, and prints its result as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from random_checkpoint import published, shrunk, write_checkpoint
from reporting import ROOT, versions

sys.path.insert(0, str(ROOT))  # the simulated GPU of the tests

MODEL = "blip2-opt-2.7b"
TOKENS = 20  # of each caption
ROUNDS = 5
PROMPT = "a photo of"
MIB = 1 << 20
DEVICES = {True: "cpu", False: "cuda"}  # torch's device, by whether this is a dry run


@dataclass(frozen=True)
class Step:
    """A step: its name, the part that it belongs to, its time limit, and the function that returns its result.

    The argument of ``run`` is whether this is a dry run.
    """

    name: str
    part: int
    limit_s: float
    run: Callable[[bool], dict[str, Any]]


def picture() -> PIL.Image.Image:
    """Makes the picture that the steps caption: noise, 640 × 480 pixels."""
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))


def device(dry: bool) -> str:
    """Returns torch's device: ``cpu`` in a dry run, else ``cuda``."""
    return "cpu" if dry else "cuda"


def synchronize(dry: bool) -> None:
    """Waits until the GPU is idle."""
    if not dry:
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], dry: bool, rounds: int = ROUNDS) -> list[float]:
    """Measures the wall seconds of each of several calls, after a warm-up; waits for the GPU around each call."""
    call()
    found = []
    for _ in range(rounds):
        synchronize(dry)
        start = time.perf_counter()
        call()
        synchronize(dry)
        found.append(time.perf_counter() - start)
    return found


# Part 1


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
    """Measures a copy on the GPU in bytes a second; a byte counts twice, because it is read and written."""
    size = 16 * MIB if dry else 2048 * MIB
    source = torch.ones(size, dtype=torch.uint8, device=DEVICES[dry])
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), dry))
    return {"bytes": 2 * size, "seconds": best, "gigabytes_per_s": 2 * size / best / 1e9}


def cuda_layer(dry: bool) -> dict[str, Any]:
    """Checks our layer over cuda-bindings: copies in both directions, events, a captured graph, a failing capture."""
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
    """Captures a matrix product of torch as a CUDA graph on our stream, then replays it on another input."""
    if dry:
        return {"ok": True, "note": "needs a GPU"}
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
    return {"ok": bool(torch.equal(wanted, result))}


def runtime(dry: bool) -> dict[str, Any]:
    """Runs our TensorRT runtime on the real CUDA, with ONNX Runtime on the CPU in place of the engines.

    Memory, copies, streams, events and the order of calls are those of a GPU; the tokens must equal the CPU backend's.
    """
    from blip2edge.export.pipeline import export_checkpoint
    from blip2edge.runtime.backends.engine_files import KIND
    from blip2edge.runtime.captioning.captioner import Captioner
    from tests.engine import fake_engines, host_engines

    with tempfile.TemporaryDirectory() as folder, host_engines.Patches() as patches:
        bundle = export_checkpoint(ROOT / "examples" / "checkpoint", Path(folder) / "bundle").bundle
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
                with Captioner.load(bundle, backend=backend, threads=1) as captioner:  # type: ignore[arg-type]
                    tokens.append([one.tokens for one in captioner.caption_many(pictures, batch_size=4, **given)])
            equal[json.dumps(given)] = tokens[0] == tokens[1]
    return {"equal_tokens": equal, "ok": all(equal.values())}


def peer_model(dry: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """Makes transformers' model in the published model's shape, with random weights on the device, and its inputs."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    values = shrunk(published(MODEL)) if dry else published(MODEL)
    dtype = torch.float32 if dry else torch.float16
    torch.manual_seed(0)
    with torch.device(DEVICES[dry]):
        torch.set_default_dtype(dtype)
        model = Blip2ForConditionalGeneration(Blip2Config.from_dict(values)).eval()
        torch.set_default_dtype(torch.float32)
    size, slots = values["vision_config"]["image_size"], values["num_query_tokens"]
    image = values["image_token_index"]
    inputs = {
        "pixel_values": torch.randn(1, 3, size, size, device=DEVICES[dry], dtype=dtype),
        "input_ids": torch.tensor([[image] * slots + [2, 4, 5]], device=DEVICES[dry]),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model, inputs


def peer(dry: bool, **generation: Any) -> dict[str, Any]:
    """Measures the seconds of a caption of `TOKENS` tokens with transformers: preprocessing, then ``generate``."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    model, inputs = peer_model(dry)
    size = inputs["pixel_values"].shape[-1]
    processor = BlipImageProcessorPil(size={"height": size, "width": size})

    def caption() -> Any:
        pixels = processor(images=picture(), return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels.to(model.device, model.dtype)
        with torch.inference_mode():
            forced = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
            return model.generate(**inputs, **forced, **generation)

    found = seconds_of(caption, dry, 2 if dry else ROUNDS)
    weights = sum(tensor.nbytes for tensor in model.language_model.parameters())
    return {
        "seconds": found,
        "milliseconds": statistics.median(found) * 1e3,
        "tokens": TOKENS,
        "language_model_bytes": weights,
    }


def compiled(dry: bool) -> dict[str, Any]:
    """Times transformers with a static KV cache, which compiles the decode step with ``reduce-overhead`` on a GPU."""
    return peer(dry, cache_implementation="static", **({"disable_compile": True} if dry else {}))


# Part 2


def bundles(folder: Path, precisions: tuple[str, ...]) -> dict[str, Path]:
    """Exports the miniature model in these precisions; ``int4`` is calibrated from ``fp16``. Returns the bundles."""
    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.export.pipeline import export_checkpoint

    made = {}
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
    """Compares ONNX Runtime on CUDA with the CPU: the token ids, and the provider of every node."""
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
                    with Captioner.load(bundle, backend=backend) as captioner:  # type: ignore[arg-type]
                        results = captioner.caption_many(pictures, draft="none", max_new_tokens=TOKENS)
                        tokens.append([one.tokens for one in results])
                        vision = captioner.encoder.images.vision
                        nodes = dict(getattr(vision, "nodes", {}))
                equal = sum(one == two for one, two in zip(*tokens, strict=True))
                found[f"{precision} {form}"] = {"equal": equal, "of": len(pictures), "vision_nodes": nodes}
    return {"captions": found, "ok": all(one["equal"] == one["of"] for name, one in found.items() if "fp32 p" in name)}


def true_size(dry: bool) -> dict[str, Any]:
    """Times our captioner and eager transformers alternately (A B A B), both in the published model's shape."""
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
    """Measures pictures a second: with vision during decoding (the scheduler), and one picture after the other."""
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


STEPS = (
    Step("machine", 1, 30, machine),
    Step("bandwidth", 1, 30, bandwidth),
    Step("cuda_layer", 1, 30, cuda_layer),
    Step("captured_torch", 1, 30, captured_torch),
    Step("runtime", 1, 90, runtime),
    Step("eager", 1, 90, peer),
    Step("compiled", 1, 120, compiled),
    Step("provider", 2, 90, provider),
    Step("overlap", 2, 60, overlap),
    Step("true_size", 2, 240, true_size),
)


def main() -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[step.name for step in STEPS])
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    (step,) = (step for step in STEPS if step.name == options.step)
    print(json.dumps(step.run(options.dry_run)), flush=True)


if __name__ == "__main__":
    main()
