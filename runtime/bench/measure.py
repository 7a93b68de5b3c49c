"""Measures a bundle on this machine, for ``blip2edge bench``: stages, throughput, memory, and growth with the input.

Every stage is timed in wall time (how long a user waits) and in CPU time of the process (which hardly depends on the
load of other processes). All captions of a run have the same length, so that runs can be compared.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import blip2edge
from blip2edge.bundle.schema import VISION
from blip2edge.errors import PromptError, UsageError, option
from blip2edge.packages import installed
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.huge_pages import wait_for_huge_pages
from blip2edge.runtime.backends.probe import processor
from blip2edge.runtime.bench.meters import CpuClock, EnergyMeter, MemoryMeter, resident_bytes
from blip2edge.runtime.bench.roofline import PICTURE, measure_available
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import STAGES, EncodedBatch
from blip2edge.runtime.decoding.generate import argmax
from blip2edge.runtime.decoding.options import CaptionOptions
from blip2edge.shapes.cost import Roofline, StageCost

PERCENTILES = (50, 90, 99)
PACKAGES = ("onnxruntime", "openvino", "numpy")
GROWTH_RUNS = 3


@dataclass(frozen=True)
class BenchOptions:
    """The options of ``blip2edge bench``. A sweep measures times for several values of one quantity.

    Attributes:
        runs: Number of captions that are timed.
        warmup: Number of captions that are generated first and not timed.
        tokens: Length of every caption in tokens.
        batches: Batch sizes (in pictures) that the batch sweep measures.
        prompts: Lengths of the prompt (in words) that the prompt sweep measures.
        lengths: Lengths of the caption (in tokens) that the caption sweep measures.
    """

    runs: int = 10
    warmup: int = 2
    tokens: int = 20
    batches: tuple[int, ...] = (1, 2, 4, 8)
    prompts: tuple[int, ...] = (0, 8, 32)
    lengths: tuple[int, ...] = (10, 20, 40)

    def __post_init__(self) -> None:
        for name in ("runs", "tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{option(name)} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class StageTimes:
    """The measured times of one stage of captioning, such as the vision encoder.

    Attributes:
        ms: Percentiles of the wall time in milliseconds: ``p50``, ``p90``, ``p99``.
        cpu_ms: Median CPU time in milliseconds.
        least_cpu_ms: Least CPU time in milliseconds; ``share`` is computed from it.
        share: The shortest time that this machine could need by the roofline model, divided by ``least_cpu_ms``; None
            if the number of operations is not known.
        bound: What limits the shortest time: ``products`` (matrix multiplications) or ``bytes`` (reading weights);
            empty if not known.
    """

    ms: Mapping[str, float]
    cpu_ms: float
    least_cpu_ms: float
    share: float | None = None
    bound: str = ""


@dataclass(frozen=True)
class BenchReport:
    """Everything that was measured; ``--json`` prints :meth:`to_json`.

    Attributes:
        machine: Processor, cores, system, backend and threads.
        versions: Versions of the packages.
        bundle: Family, precisions and hash of the bundle.
        options: The options of the measurement.
        stages: Times by stage name; ``total`` is the sum of all stages.
        tokens_per_s: Tokens a second while decoding, at the median.
        start_s: Seconds to load the bundle.
        memory: Bytes: ``peak`` of the whole run, ``loading`` (peak while the bundle is loaded), ``captioning`` (peak
            while single pictures are captioned), ``resident`` at the end, and ``graphs`` (the files of the weights).
        sweeps: Tables by name: ``batch``, ``prompt``, ``caption``; each a list of rows.
        left_out: What was not measured, with the reason.
        energy: Joules per caption, and the meter; None if the machine has no meter.
        draft: The draft model (``itg`` or ``lookup``), and the number of tokens per pass of the language model; None
            without speculative decoding. ``stages`` are always measured with plain decoding.
        roofline: The limits of one core of this machine, and the ``backend`` that they were measured with; empty if
            they were not measured.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    bundle: Mapping[str, Any]
    options: BenchOptions
    stages: Mapping[str, StageTimes]
    tokens_per_s: float
    start_s: float
    memory: Mapping[str, int]
    sweeps: Mapping[str, list[dict[str, float]]]
    left_out: Mapping[str, str]
    energy: Mapping[str, Any] | None
    draft: Mapping[str, Any] | None
    roofline: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object with the attributes as keys."""
        return asdict(self)


class Bench:
    """Runs the measurements on one loaded captioner.

    Args:
        captioner: The captioner.
        picture: The picture to caption, ``[H, W, 3]`` uint8; None for random noise.

    Attributes:
        left_out: What a sweep did not measure, with the reason.
    """

    def __init__(self, captioner: Captioner, picture: NDArray[np.uint8] | None = None) -> None:
        self.captioner = captioner
        made = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
        self.picture = made if picture is None else picture
        spec = captioner.bundle.manifest.prompt
        self.frames = 1 if spec is None else spec.frames
        self.left_out: dict[str, str] = {}
        self.prompt = "" if spec is not None and spec.required and spec.default is None else None

    def caption(self, tokens: int, pictures: int = 1, prompt: str | None = None) -> CpuClock:
        """Captions pictures in one batch, and times each stage.

        Args:
            tokens: Length of every caption in tokens.
            pictures: Number of pictures in the batch.
            prompt: The prompt; None for the bundle's default.
        """
        clock = CpuClock()
        item: Any = self.picture if self.frames == 1 else [self.picture] * self.frames
        text = self.prompt if prompt is None else prompt
        encoded: EncodedBatch = self.captioner.encoder([item] * pictures, [text] * pictures, clock)
        logits, state = self.captioner.generator.prefill(encoded, clock)
        with clock("decode"):
            for _ in range(tokens - 1):
                logits = state.step(argmax(logits))
        return clock

    def drafted(self, tokens: int, runs: int) -> dict[str, Any] | None:
        """Captions with speculative decoding, and counts the tokens of each pass of the language model.

        Args:
            tokens: Length of every caption in tokens.
            runs: Number of captions.

        Returns:
            ``kind`` (name of the draft model) and ``tokens_per_pass`` (median over the captions); None if the bundle
            has no draft model.
        """
        forced: CaptionOptions = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        kind = self.captioner.generator.drafts.kind(self.captioner.options(**forced))
        if kind == "none":
            return None
        item: Any = self.picture if self.frames == 1 else [self.picture] * self.frames
        found = [self.captioner.caption(item, prompt=self.prompt, **forced) for _ in range(runs)]
        return {"kind": kind, "tokens_per_pass": float(np.median([one.tokens_per_pass for one in found]))}

    def prompt_length(self, prompt: str | None = None, *, decoder: bool = True) -> int:
        """Returns the number of tokens of a prompt, visual tokens included; without ``prompt``, of the default prompt.

        ``decoder``: whether to count only the tokens that the decoder processes. In an encoder-decoder model, this is
        the start token.
        """
        text = self.captioner.prompts.with_default(self.prompt if prompt is None else prompt)
        initial = self.captioner.generator.language.initial if decoder else []
        return len(initial) or self.captioner.prompts(text, self.frames).length

    def room(self) -> int:
        """Returns the number of tokens of the longest possible caption; the last token needs no slot in the cache."""
        return self.captioner.generator.max_positions - self.prompt_length() + 1

    def sweep_batches(self, batches: Sequence[int], tokens: int) -> list[dict[str, float]]:
        """Measures pictures per second of CPU time and of wall time, for each batch size in ``batches``.

        Every caption has ``tokens`` tokens. Sizes that the decoder's engine does not support are left out.
        """
        rows, most = [], self.captioner.generator.language.decoder.max_rows
        for size in batches:
            if most is not None and size > most:
                self.left_out[f"batches of {size} pictures"] = f"the decoder takes at most {most} rows"
                continue
            runs = [self.caption(tokens, size) for _ in range(GROWTH_RUNS)]
            cpu = min(sum(run.cpu_ms.values()) for run in runs) / 1e3
            wall = min(sum(run.ms.values()) for run in runs) / 1e3
            rows.append({"batch": float(size), "pictures_per_cpu_s": size / cpu, "pictures_per_s": size / wall})
        return rows

    def sweep_prompts(self, words: Sequence[int]) -> list[dict[str, float]]:
        """Measures the CPU time of the prefill in milliseconds; ``words``: the number of words of each prompt."""
        rows = []
        for count in words:
            text = "a " * count
            try:
                slots = self.prompt_length(text, decoder=False)
            except PromptError as error:
                self.left_out[f"prompts of {count} words"] = error.problem
                break
            runs = [self.caption(1, prompt=text) for _ in range(GROWTH_RUNS)]
            rows.append({"slots": float(slots), "prefill_cpu_ms": min(run.cpu_ms["prefill"] for run in runs)})
        return rows

    def sweep_lengths(self, lengths: Sequence[int]) -> list[dict[str, float]]:
        """Measures the CPU time per token in milliseconds, for each length of the caption in ``lengths`` (tokens)."""
        rows = []
        for tokens in lengths:
            if tokens < 2:
                continue
            if tokens > self.room():
                self.left_out[f"captions of {tokens} tokens"] = f"the context leaves room for {self.room()}"
                continue
            runs = [self.caption(tokens) for _ in range(GROWTH_RUNS)]
            least = min(run.cpu_ms["decode"] for run in runs)
            rows.append({"tokens": float(tokens), "decode_cpu_ms_per_token": least / (tokens - 1)})
        return rows


CostOf = Callable[[int, int], Mapping[str, StageCost]]
"""Type of a function that counts operations and bytes of each stage, given the tokens of the prompt and of the caption.
"""


def bench(
    captioner: Captioner,
    options: BenchOptions,
    *,
    start_s: float,
    start_bytes: int = 0,
    cost_of: CostOf | None = None,
    progress: ProgressCallback | None = None,
) -> BenchReport:
    """Measures time, memory and energy of a captioner.

    Args:
        captioner: A loaded bundle.
        options: What to measure.
        start_s: Seconds that loading the bundle took.
        start_bytes: Peak memory in bytes while the bundle was loaded; 0 if it was not measured.
        cost_of: Counts the operations and bytes of each stage; None if they are not known.
        progress: Called with the name of the current measurement, steps done and steps in all.

    Raises:
        UsageError: Prompt and caption together are longer than the model's context.
    """
    report = progress or (lambda stage, done, total: None)
    run, tokens = Bench(captioner), options.tokens
    if tokens > run.room():
        raise UsageError(
            f"expected {option('tokens')} to be at most {run.room()}, the room that the prompt leaves in the context "
            f"of {captioner.generator.max_positions} tokens, got {tokens}"
        )
    clocks: list[CpuClock] = []
    energy = EnergyMeter()
    with MemoryMeter() as whole:
        for _ in range(options.warmup):
            run.caption(tokens)
        wait_for_huge_pages()
        with MemoryMeter() as single, energy:
            for number in range(options.runs):
                report("captions", number, options.runs)
                clocks.append(run.caption(tokens))
            report("captions", options.runs, options.runs)
        draft = run.drafted(tokens, options.runs)
        report("roofline", 0, 1)
        roofline, measured_with = measure_available(captioner.graphs.backend)
        costs = cost_of(run.prompt_length(), tokens) if cost_of is not None and roofline is not None else {}
        stages = _stages(clocks, costs, roofline)
        report("roofline", 1, 1)
        report("sweeps", 0, 3)
        sweeps = {"batch": run.sweep_batches(options.batches, tokens)}
        report("sweeps", 1, 3)
        sweeps["prompt"] = run.sweep_prompts(options.prompts)
        report("sweeps", 2, 3)
        sweeps["caption"] = run.sweep_lengths(options.lengths)
        report("sweeps", 3, 3)
    resident = resident_bytes()
    decode = stages["decode"].ms["p50"] / 1e3
    return BenchReport(
        machine=_machine(captioner),
        versions={
            "blip2edge": blip2edge.__version__,
            "python": platform.python_version(),
            **{name: found for name in PACKAGES if (found := installed(name))},
        },
        bundle=_bundle(captioner),
        options=options,
        stages=stages,
        tokens_per_s=(tokens - 1) / decode if tokens > 1 and decode > 0 else 0.0,
        start_s=start_s,
        memory={
            "peak": max(start_bytes, whole.peak, resident),
            "loading": start_bytes,
            "captioning": single.peak,
            "resident": resident,
            "graphs": _graph_bytes(captioner),
        },
        sweeps=sweeps,
        left_out={**_left_out(captioner, energy, cost_of is not None, roofline is not None), **run.left_out},
        energy=_energy(energy, options.runs),
        draft=draft,
        roofline={} if roofline is None else {"backend": measured_with, **roofline.to_json()},
    )


def _stages(
    clocks: Sequence[CpuClock], costs: Mapping[str, StageCost], roofline: Roofline | None
) -> dict[str, StageTimes]:
    stages: dict[str, StageTimes] = {}
    for stage in STAGES:
        wall = [clock.ms[stage] for clock in clocks]
        cpu = [clock.cpu_ms[stage] for clock in clocks]
        stages[stage] = _times(wall, cpu, costs.get(stage), roofline)
    total = [sum(clock.ms.values()) for clock in clocks]
    stages["total"] = _times(total, [sum(clock.cpu_ms.values()) for clock in clocks], None, roofline)
    return stages


def _times(
    wall: Sequence[float], cpu: Sequence[float], cost: StageCost | None, roofline: Roofline | None
) -> StageTimes:
    ms = {f"p{part}": float(np.percentile(wall, part)) for part in PERCENTILES}
    least, share, bound = min(cpu), None, ""
    if cost is not None and roofline is not None:
        share = cost.seconds(roofline) * 1e3 / least if least > 0 else None
        bound = cost.limited_by(roofline)
    return StageTimes(ms, float(np.median(cpu)), least, share, bound)


def _left_out(captioner: Captioner, energy: EnergyMeter, has_costs: bool, has_roofline: bool) -> dict[str, str]:
    left: dict[str, str] = {}
    if energy.reason:
        left["energy"] = energy.reason
    if not has_roofline:
        left["roofline"] = "it is measured with ONNX Runtime or OpenVINO, and neither is installed"
    elif not has_costs:
        left["roofline shares"] = "the graphs are read with the packages onnx and onnx_ir, which are not installed"
    sizes = captioner.bundle.graph(VISION).spec.inputs[0].dims[2:]
    if all(isinstance(size, int) for size in sizes):
        left["growth with picture size"] = (
            f"the vision encoder takes {sizes[0]} x {sizes[1]} pixels, whatever the picture's size"
        )
    return left


def _energy(meter: EnergyMeter, captions: int) -> dict[str, Any] | None:
    if meter.joules is None:
        return None
    return {"source": meter.source, "joules_per_caption": meter.joules / captions}


def _machine(captioner: Captioner) -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "system": platform.platform(),
        "backend": captioner.graphs.backend,
        "threads": captioner.graphs.threads,
    }


def _bundle(captioner: Captioner) -> dict[str, Any]:
    manifest = captioner.bundle.manifest
    return {
        "family": manifest.family,
        "precision": {name: graph.precision for name, graph in manifest.graphs.items()},
        "optimised": sorted(captioner.graphs.copied),
        "sha256": captioner.bundle.sha256,
    }


def _graph_bytes(captioner: Captioner) -> int:
    """Returns the bytes of the weight files of all graphs in the bundle."""
    files = captioner.bundle.manifest.files
    names = {data for graph in captioner.bundle.manifest.graphs.values() for data in graph.data_files}
    return sum(files[name].size for name in names)
