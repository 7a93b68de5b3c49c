"""``blip2edge plan``: predicts whether a model fits a device, how fast a caption is, and which bridge is best.

The predictions are computed from the sizes of the model's layers (:mod:`blip2edge.shapes`) and from the device's
memory, bandwidth and operations per second (:mod:`.devices`). No model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blip2edge.bundle.schema import BRIDGE, DECODER, VISION
from blip2edge.errors import UsageError, option
from blip2edge.runtime.bench.devices import GB, Board
from blip2edge.runtime.bench.memory import RunMemory, build_memory, element_bytes, held_precision, run_memory
from blip2edge.runtime.bench.roofline import reference_seconds
from blip2edge.shapes.bridges import TRADE_OFFS, with_bridges
from blip2edge.shapes.cost import Roofline, StageCost
from blip2edge.shapes.model_shape import FORMATS, FUSED_OPERATORS, HeldWeights, ModelPart, ModelShape, TokenCounts

HOST_S = {"preprocess": 2e-4, "vision": 5e-5, "bridge": 2e-4, "prefill": 5e-4, "decode": 3e-5}
"""Assumed seconds of Python code in each stage (``decode``: in one step), on one core of an AMD EPYC: chosen so that
predicted times come near the measured times in ``benchmarks/results/plan.json``."""

STAGE_OF = {VISION: "vision", BRIDGE: "bridge"}
"""Stage to which the time of a graph is added; the time of all other graphs is added to the prefill."""

CONVOLUTION_OPERATORS, CONVOLVED_BYTES = 3, 32 << 20
"""If a floating-point decoder's weights have more than ``CONVOLVED_BYTES``, an optimized copy for the CPU computes its
matrix multiplications as convolutions. Each convolution needs ``CONVOLUTION_OPERATORS`` more operators."""

CACHED_BYTES = 8 << 20
"""Bytes of weights that stay in a CPU's largest cache between two runs of a graph."""

CHEAP_SHARE = 0.25
"""An MLP is recommended if it adds at most this share to the time of a caption with a Q-Former."""


@dataclass(frozen=True)
class PlanOptions:
    """The request whose time and memory are predicted: one caption of one item (a picture or a video).

    Attributes:
        frames: Pictures of the item; None for the model's own number (1, or the frames of a video model).
        prompt_tokens: Tokens of the prompt, without visual tokens.
        new_tokens: Tokens of the caption.
        threads: CPU threads of the device ``this`` (this machine); None for all cores.
    """

    frames: int | None = None
    prompt_tokens: int = 8
    new_tokens: int = 30
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "prompt_tokens", "new_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{option(name)} must be at least 1, not {value}")


@dataclass(frozen=True)
class PrecisionPlan:
    """The predictions for a model in one precision on one device.

    Attributes:
        memory: Memory that captioning needs.
        build: Peak memory, in bytes, of building the engines (on a CPU: the optimized copy) on the device.
        fits_run, fits_build: Whether ``memory`` and ``build`` fit the device's memory; false for a refused precision.
        refused: Why the device does not run this precision; empty if it does.
        ms: Predicted milliseconds: ``preprocess``, ``vision``, ``bridge``, ``prefill``, ``decode_per_token``,
            ``decode`` (all tokens after the first), ``total``.
    """

    precision: str
    memory: RunMemory
    build: int
    fits_run: bool
    fits_build: bool
    refused: str
    ms: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """Returns whether the device can build and run this precision."""
        return self.fits_run and self.fits_build

    @property
    def tokens_per_s(self) -> float:
        """Returns the tokens per second while decoding."""
        return 1e3 / self.ms["decode_per_token"]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for ``plan --json``; the times of a refused precision are null."""
        times = {stage: None if self.refused else round(ms, 3) for stage, ms in self.ms.items()}
        return {
            "precision": self.precision,
            "memory_bytes": {**self.memory.to_json(), "build": self.build},
            "fits_run": self.fits_run,
            "fits_build": self.fits_build,
            "refused": self.refused,
            "ms": times,
            "tokens_per_s": None if self.refused else round(self.tokens_per_s, 2),
        }


@dataclass(frozen=True)
class BridgeRow:
    """The predictions for one kind of bridge between the same vision encoder and language model.

    Attributes:
        kind: ``qformer``, ``mlp``, ``perceiver`` or ``pool``.
        parameters: Number of parameters of the bridge.
        tokens_per_picture, tokens: Number of visual tokens of one picture, and of the whole item (picture or video).
        fits_context: Whether the visual tokens fit the context together with prompt and caption.
        ms: Predicted milliseconds of the bridge and the prefill together.
        total_ms: Predicted milliseconds of a caption.
        fits_memory: Whether the device can build and run the model with this bridge.
        trade_off: When this bridge is the right choice.
    """

    kind: str
    parameters: int
    tokens_per_picture: int
    tokens: int
    fits_context: bool
    ms: float
    total_ms: float
    fits_memory: bool
    trade_off: str


@dataclass(frozen=True)
class DevicePlan:
    """The predictions for a model on one device: all precisions, the bridges, and the recommended bridge.

    Attributes:
        precisions: The predictions for each precision, in the order of ``FORMATS``.
        chosen: The highest precision that fits; ``int4`` if no precision fits. Never fp32 on a GPU, because fp16 is
            faster with the same captions; never fp16 on a CPU, because a CPU computes fp16 in fp32.
        bridges: The predictions for each bridge; empty if the decoder reads the picture by cross-attention.
        bridge: Kind of the recommended bridge; ``none`` if no bridge is recommended.
        reason: Why this bridge is recommended.
    """

    device: Board
    precisions: tuple[PrecisionPlan, ...]
    chosen: str
    bridges: tuple[BridgeRow, ...]
    bridge: str
    reason: str

    def of(self, precision: str) -> PrecisionPlan:
        """Returns the predictions for one precision."""
        return next(one for one in self.precisions if one.precision == precision)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for ``plan --json``."""
        device = self.device
        return {
            "device": device.name,
            "title": device.title,
            "measured": device.measured,
            "usable_bytes": device.usable,
            "gigabytes_per_s": round(device.bytes_per_s / GB, 1),
            "gigaops_per_s": {kind: round(rate / GB, 1) for kind, rate in device.rates.items()},
            "source": device.source,
            "efficiency": asdict(device.efficiency),
            "precisions": [one.to_json() for one in self.precisions],
            "chosen_precision": self.chosen,
            "bridges": [asdict(row) for row in self.bridges],
            "recommendation": {"bridge": self.bridge, "reason": self.reason},
        }


def token_budget(shape: ModelShape, options: PlanOptions) -> dict[str, Any]:
    """Counts the visual tokens of a picture and of the item, and the slots of the KV cache that the request needs."""
    frames = options.frames or shape.frames
    slots = shape.slots * frames + options.prompt_tokens + options.new_tokens
    return {
        "patches": shape.patches,
        "per_picture": shape.visual_tokens,
        "frames": frames,
        "per_item": shape.visual_tokens * frames,
        "take_slots": shape.slots > 0,
        "prompt": options.prompt_tokens,
        "new": options.new_tokens,
        "slots": slots,
        "context": shape.max_positions,
        "fits": slots <= shape.max_positions,
    }


def effective(device: Board, kind: str, size: float) -> Roofline:
    """Returns the bytes and operations per second that graphs are assumed to reach on a device.

    Args:
        device: The device.
        kind: The format of the weights.
        size: Bytes of weights that one run of the graph reads. At most :data:`CACHED_BYTES` stay in a CPU's cache, from
            which they are read faster than from memory.
    """
    share = device.efficiency
    floating = kind in ("fp32", "fp16")
    cached = floating and size <= CACHED_BYTES
    floats = kind if floating else "fp32" if device.is_cpu else "fp16"
    return Roofline(
        device.bytes_per_s * (share.cached_bytes if cached else share.bytes[kind]),
        device.rate(floats) * share.products[floats],
        device.rate(kind) * share.products[kind],
    )


def part_cost(part: ModelPart, weights: HeldWeights, device: Board, tokens: TokenCounts, times: int = 1) -> StageCost:
    """Counts operations and bytes of one run of a graph such as the bridge (``part``); ``times`` is the batch size."""
    share = device.efficiency
    products = times * sum(matrix.operations(tokens, share.extra_rows, share.overlaps) for matrix in part.matrices)
    scores = times * sum(attention.operations(tokens) for attention in part.attentions)
    integers = 0.0 if weights.floating else products
    return StageCost(scores + products - integers, integers, weights.bytes)


def part_seconds(
    part: ModelPart, cost: StageCost, weights: HeldWeights, device: Board, tokens: TokenCounts, times: int = 1
) -> float:
    """Predicts the seconds of one run of a graph (``part``).

    The time is the sum of the graph's matrix multiplications, its other operators, and the overhead of each call.
    """
    share = device.efficiency
    between = times * part.elements(tokens) * share.element_s + operators(part, weights, device) * share.call_s
    return cost.seconds(effective(device, weights.kind, cost.bytes), overlaps=share.overlaps) + between


def operators(part: ModelPart, weights: HeldWeights, device: Board) -> int:
    """Returns the number of operators that one run of a graph (``part``) calls.

    In a CPU's optimized copy, a large floating-point decoder has a convolution with a reshape and a transpose in place
    of each matrix multiplication.
    """
    if device.efficiency.fuses:
        return part.calls * FUSED_OPERATORS
    convolved = part.name == DECODER and weights.floating and weights.bytes > CONVOLVED_BYTES
    return part.calls * (part.operators + convolved * CONVOLUTION_OPERATORS)


def step_cost(shape: ModelShape, weights: HeldWeights, element: float, device: Board, tokens: TokenCounts) -> StageCost:
    """Counts the operations of one decode step, and the bytes of the decoder's weights and KV cache that it reads.

    Args:
        shape: Sizes of the model's layers.
        weights: Format and bytes of the decoder's weights.
        element: Bytes of one number in the KV cache.
        device: The device.
        tokens: Numbers of tokens; ``context`` is the number of tokens in the KV cache.
    """
    cache = shape.cache.bytes(tokens["context"], tokens["source"], element)
    cost = part_cost(shape.decoder, weights, device, tokens)
    return cost + StageCost(0.0, 0.0, cache * device.efficiency.cache_passes)


def stage_ms(shape: ModelShape, precision: str, device: Board, options: PlanOptions) -> dict[str, float]:
    """Predicts the milliseconds of each stage of one caption."""
    frames = options.frames or shape.frames
    tokens, held = shape.tokens(frames, options.prompt_tokens), held_precision(precision, device)
    seconds = {stage: device.host * HOST_S[stage] for stage in ("vision", "bridge", "prefill")}
    if shape.part(BRIDGE) is None:
        seconds["bridge"] = 0.0
    for part in shape.parts:
        times = frames if part.name in (VISION, BRIDGE) else 1
        weights = part.weights(held)
        cost = part_cost(part, weights, device, tokens, times)
        seconds[STAGE_OF.get(part.name, "prefill")] += part_seconds(part, cost, weights, device, tokens, times)
    steps = options.new_tokens - 1
    middle = {**tokens, "steps": 1, "context": tokens["context"] + 1 + steps // 2}
    weights = shape.decoder.weights(held)
    cost = step_cost(shape, weights, element_bytes(precision, device), device, middle)
    step = device.host * HOST_S["decode"] + part_seconds(shape.decoder, cost, weights, device, middle)
    pixels = frames * reference_seconds(shape.image_size) + HOST_S["preprocess"]
    ms = {"preprocess": device.host * pixels * 1e3}
    ms |= {stage: value * 1e3 for stage, value in seconds.items()}
    total = sum(ms.values()) + steps * step * 1e3
    return {**ms, "decode_per_token": step * 1e3, "decode": steps * step * 1e3, "total": total}


def precision_plan(shape: ModelShape, precision: str, device: Board, options: PlanOptions) -> PrecisionPlan:
    """Predicts memory and times of a model in one precision on one device."""
    frames = options.frames or shape.frames
    memory = run_memory(shape, precision, device, frames, options.prompt_tokens, options.new_tokens)
    build = build_memory(shape, precision, device)
    ms = stage_ms(shape, precision, device, options)
    refused = device.refuses.get(precision, "")
    fits_run, fits_build = (not refused and needed <= device.usable for needed in (memory.total, build))
    return PrecisionPlan(precision, memory, build, fits_run, fits_build, refused, ms)


def device_plan(shape: ModelShape, device: Board, options: PlanOptions) -> DevicePlan:
    """Predicts memory and times of a model on one device, in every precision, and recommends a bridge."""
    rows = tuple(precision_plan(shape, precision, device, options) for precision in FORMATS)
    order = [row for row in rows if row.precision != ("fp16" if device.is_cpu else "fp32")]
    chosen = next((row.precision for row in order if row.fits), order[-1].precision)
    bridges = tuple(bridge_rows(shape, chosen, device, options))
    bridge, reason = recommended(shape, bridges, options)
    return DevicePlan(device, rows, chosen, bridges, bridge, reason)


def bridge_rows(shape: ModelShape, precision: str, device: Board, options: PlanOptions) -> list[BridgeRow]:
    """Predicts memory and times of the model with each kind of bridge, on one device in one precision."""
    rows = []
    for kind, other in with_bridges(shape).items():
        plan, budget = precision_plan(other, precision, device, options), token_budget(other, options)
        part = other.part(BRIDGE)
        rows.append(
            BridgeRow(
                kind=kind,
                parameters=part.parameters if part is not None else 0,
                tokens_per_picture=budget["per_picture"],
                tokens=budget["per_item"],
                fits_context=budget["fits"],
                ms=round(plan.ms["bridge"] + plan.ms["prefill"], 3),
                total_ms=round(plan.ms["total"], 3),
                fits_memory=plan.fits,
                trade_off=TRADE_OFFS[kind],
            )
        )
    return rows


def recommended(shape: ModelShape, rows: Sequence[BridgeRow], options: PlanOptions) -> tuple[str, str]:
    """Recommends a bridge; returns its kind and the reason. The first rule whose condition holds decides.

    1. If the decoder reads the picture by cross-attention: the model's own bridge.
    2. If prompt and caption fill the context, or the model is too large for the device with every bridge: ``none``.
    3. If the tokens of an MLP fit the context and cost little time: the MLP, which keeps all patches.
    4. If the tokens of a Q-Former do not fit the context: a Q-Former with fewer queries.
    5. If the model with a Q-Former does not fit the device: of the bridges with which it fits, the one with the fewest
       tokens.
    6. In all other cases: the Q-Former.
    """
    if not rows:
        if shape.bridge == "none":
            return "none", "the decoder cross-attends to the patches, which take no slots of the context"
        return shape.bridge, (
            f"the decoder cross-attends to {shape.visual_tokens} tokens of each picture, which take no slots of the "
            "context"
        )
    by = {row.kind: row for row in rows}
    few, all_patches = by["qformer"], by["mlp"]
    room = shape.max_positions - options.prompt_tokens - options.new_tokens
    if room < 1:
        return "none", (
            f"prompt and caption alone fill the {shape.max_positions:,} tokens of the context, so that no visual token "
            "fits: shorten them"
        )
    frames = options.frames or shape.frames
    fitting = [row for row in rows if row.fits_memory]
    if not fitting:
        return "none", f"the model does not fit the device with any bridge{f' at {frames:,} frames' * (frames > 1)}"
    extra = all_patches.total_ms - few.total_ms
    if all_patches.fits_context and all_patches.fits_memory and extra <= CHEAP_SHARE * few.total_ms:
        return "mlp", (
            f"its {all_patches.tokens:,} tokens fit the {room:,} free slots and cost {max(extra, 0):.0f} ms more than "
            f"a Q-Former, {max(extra, 0) / few.total_ms:.0%} of a caption; it keeps every patch"
        )
    against = (
        f"{all_patches.tokens:,} tokens of an MLP do not fit the {room:,} free slots"
        if not all_patches.fits_context
        else f"the {all_patches.tokens:,} tokens of an MLP cost {extra:.0f} ms more, {extra / few.total_ms:.0%} of a "
        "caption"
        if all_patches.fits_memory
        else "the device has too little memory for an MLP's tokens"
    )
    if not few.fits_context:
        mend = _fewer_tokens(room, few.tokens_per_picture, frames)
        return "qformer", f"{few.tokens:,} tokens do not fit the {room:,} free slots either: {mend}"
    if not few.fits_memory:
        small = min(fitting, key=lambda row: (row.tokens, row.parameters))
        return small.kind, (
            f"the model fits the device with its {small.parameters / 1e6:.0f} M parameters, and not with the "
            f"{few.parameters / 1e6:.0f} M of a Q-Former"
        )
    return "qformer", f"{against}; a Q-Former needs {few.tokens:,} and has the most quality for each token"


def _fewer_tokens(room: int, queries: int, frames: int) -> str:
    """Returns advice for a Q-Former with more tokens than ``room`` free slots: fewer frames, fewer queries, or both."""
    ways = []
    if room >= queries:
        ways.append(f"take at most {_counted(room // queries, 'frame', 'frames')}")
    if room >= frames:
        ways.append(f"train a Q-Former of at most {_counted(room // frames, 'query', 'queries')}")
    fewer = f"take at most {_counted(room, 'frame', 'frames')}, and train a Q-Former of fewer queries"
    return ", or ".join(ways) or fewer


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
