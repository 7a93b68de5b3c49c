"""``blip2edge plan``: predicts whether a model fits a device, how fast a caption is, and which bridge is best.

Everything is computed from the sizes of the model (:mod:`blip2edge.shapes`), by the roofline with the efficiency in
:mod:`.devices`. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blip2edge.bundle.schema import BRIDGE, DECODER, VISION
from blip2edge.errors import UsageError, option
from blip2edge.runtime.bench.devices import GB, Board
from blip2edge.runtime.bench.memory import (
    RunMemory,
    build_memory,
    element_bytes,
    held_precision,
    run_memory,
)
from blip2edge.runtime.bench.roofline import reference_seconds
from blip2edge.shapes.bridges import TRADE_OFFS, with_bridges
from blip2edge.shapes.cost import Roofline, StageCost
from blip2edge.shapes.model_shape import FORMATS, FUSED_OPERATORS, HeldWeights, ModelPart, ModelShape, TokenCounts

HOST_S = {"preprocess": 2e-4, "vision": 5e-5, "bridge": 2e-4, "prefill": 5e-4, "decode": 3e-5}
"""Seconds of Python code by stage (``decode``: a step), on one core of an AMD EPYC; not measured: chosen so that the
predictions come near ``benchmarks/results/plan.json``."""

STAGE_OF = {VISION: "vision", BRIDGE: "bridge"}
"""Stage of each graph; all graphs that are not listed run in the prefill."""

CONVOLUTION_OPERATORS, CONVOLVED_BYTES = 3, 32 << 20
"""Number of operators around a convolution that replaces a matrix multiplication; and the size of a decoder's weights,
in bytes, above which optimized copies have such convolutions."""

CACHED_BYTES = 8 << 20
"""Bytes of weights that stay in a CPU's last cache between two runs of a graph, while other programs run too."""

CHEAP_SHARE = 0.25
"""An MLP is recommended if its tokens cost at most this share of a caption with a Q-Former."""


@dataclass(frozen=True)
class PlanOptions:
    """The request whose time and memory are predicted.

    Attributes:
        frames: Pictures of an item; None for the model's own number (1, or the frames of a video model).
        prompt_tokens: Tokens of the prompt, without visual tokens.
        new_tokens: Tokens of the caption.
        threads: CPU threads of ``this``; None for all cores.
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
        memory: Bytes of memory that captioning needs.
        build: Bytes at the peak of building the engines, or a CPU's optimized copy, on the device.
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
        tokens_per_picture, tokens: Number of visual tokens of a picture, and of the whole item.
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
        precisions: In the order of ``FORMATS``.
        chosen: The highest precision that fits; ``int4`` if no precision fits. Never fp32 on a GPU, because fp16 is
            faster with the same captions; never fp16 on a CPU, because a CPU computes fp16 in fp32.
        bridges: Empty for a decoder that cross-attends to the picture without slots.
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
        """Returns the plan of one precision."""
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
    """Counts the visual tokens of a picture and of the item, and the context slots that the request needs."""
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
    """Returns the roofline that graphs reach on a board with the assumed efficiency, for weights of one format.

    Args:
        device: The board.
        kind: The format of the weights.
        size: Bytes that a run reads.
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
    """Counts operations and bytes of a run of a graph (such as the bridge); ``times`` is the batch size."""
    share = device.efficiency
    products = times * sum(matrix.operations(tokens, share.extra_rows, share.overlaps) for matrix in part.matrices)
    scores = times * sum(attention.operations(tokens) for attention in part.attentions)
    integers = 0.0 if weights.floating else products
    return StageCost(scores + products - integers, integers, weights.bytes)


def part_seconds(
    part: ModelPart, cost: StageCost, weights: HeldWeights, device: Board, tokens: TokenCounts, times: int = 1
) -> float:
    """Predicts the seconds of a run of a graph: multiplications by the roofline, other operators, calls."""
    share = device.efficiency
    between = times * part.elements(tokens) * share.element_s + operators(part, weights, device) * share.call_s
    return cost.seconds(effective(device, weights.kind, cost.bytes), overlaps=share.overlaps) + between


def operators(part: ModelPart, weights: HeldWeights, device: Board) -> int:
    """Returns the number of operators that are called in a run of a graph, such as the bridge.

    In a CPU's optimized copy, the matrix multiplications of a large floating-point decoder are convolutions, each
    between a reshape and a transpose.
    """
    if device.efficiency.fuses:
        return part.calls * FUSED_OPERATORS
    convolved = part.name == DECODER and weights.floating and weights.bytes > CONVOLVED_BYTES
    return part.calls * (part.operators + convolved * CONVOLUTION_OPERATORS)


def step_cost(shape: ModelShape, weights: HeldWeights, element: float, device: Board, tokens: TokenCounts) -> StageCost:
    """Counts operations and bytes of a decode step: the decoder's weights, keys and values of the context.

    Args:
        shape: The model.
        weights: The decoder's weights.
        element: Bytes of a value of the KV cache.
        device: The board.
        tokens: Numbers of tokens, with the context of the step.
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
    """Plans one precision on one device."""
    frames = options.frames or shape.frames
    memory = run_memory(shape, precision, device, frames, options.prompt_tokens, options.new_tokens)
    build = build_memory(shape, precision, device)
    ms = stage_ms(shape, precision, device, options)
    refused = device.refuses.get(precision, "")
    fits_run, fits_build = (not refused and needed <= device.usable for needed in (memory.total, build))
    return PrecisionPlan(precision, memory, build, fits_run, fits_build, refused, ms)


def device_plan(shape: ModelShape, device: Board, options: PlanOptions) -> DevicePlan:
    """Plans a model on one device, in every precision, and recommends a bridge."""
    rows = tuple(precision_plan(shape, precision, device, options) for precision in FORMATS)
    order = [row for row in rows if row.precision != ("fp16" if device.is_cpu else "fp32")]
    chosen = next((row.precision for row in order if row.fits), order[-1].precision)
    bridges = tuple(bridge_rows(shape, chosen, device, options))
    bridge, reason = recommended(shape, bridges, options)
    return DevicePlan(device, rows, chosen, bridges, bridge, reason)


def bridge_rows(shape: ModelShape, precision: str, device: Board, options: PlanOptions) -> list[BridgeRow]:
    """Compares the bridges on a device in one precision."""
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
    """Chooses a bridge by the token budget against the quality for each token; returns its kind and the reason.

    1. A decoder that cross-attends to the picture keeps its bridge.
    2. ``none``, if prompt and caption alone fill the context, or the model fits the device with no bridge.
    3. The MLP, if its tokens fit the context and cost little time: it loses nothing of the picture.
    4. A Q-Former with fewer queries, if not even 32 tokens a picture fit the context.
    5. If the model with a Q-Former does not fit the device: the bridge with the fewest tokens that fits, which is
       the attention pool if it fits.
    6. The Q-Former.
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
    """Says how the tokens of a Q-Former fit ``room`` free slots: fewer pictures, fewer queries, or both."""
    ways = []
    if room >= queries:
        ways.append(f"take at most {_counted(room // queries, 'frame', 'frames')}")
    if room >= frames:
        ways.append(f"train a Q-Former of at most {_counted(room // frames, 'query', 'queries')}")
    fewer = f"take at most {_counted(room, 'frame', 'frames')}, and train a Q-Former of fewer queries"
    return ", or ".join(ways) or fewer


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
