"""Writes the text of ``blip2edge plan``: parameters and tokens, a table for each device, and the arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from blip2edge.cli.table import size, table
from blip2edge.runtime.bench.devices import DEVICES
from blip2edge.runtime.bench.kernel_steps import (
    LAUNCH_S,
    PRODUCT_SHARE,
    KernelShape,
    held_on_gpu,
    kernel_steps,
    known_shape,
    prefill_parts,
    tensor_rate,
)
from blip2edge.runtime.bench.memory import element_bytes, held_precision
from blip2edge.runtime.bench.plan import (
    HOST_S,
    device_plan,
    effective,
    operators,
    part_cost,
    part_seconds,
    step_cost,
    token_budget,
)
from blip2edge.shapes.families import PUBLISHED, published_config, shape_of
from blip2edge.shapes.model_shape import FORMATS, WEIGHT_BYTES, tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blip2edge.runtime.bench.devices import Board
    from blip2edge.runtime.bench.plan import DevicePlan, PlanOptions, PrecisionPlan
    from blip2edge.shapes.model_shape import ModelPart, ModelShape

STAGES = ("preprocess", "vision", "bridge", "prefill", "decode_per_token", "total")
MEMORY_HEADER = ("precision", "weights", "KV cache", "activations", "workspace", "run", "build", "fits")
TIME_HEADER = ("precision", "preprocess", "vision", "bridge", "prefill", "a token", "total ms", "tokens/s")
BRIDGE_HEADER = ("bridge", "parameters", "tokens a picture", "tokens", "context", "memory", "bridge + prefill ms",
                 "caption ms", "")  # fmt: skip
BOARDS_HEADER = ("device", "usable", "GB/s", "precision", "run", "build", "fits", "vision ms", "prefill ms", "a token",
                 "caption ms", "tokens/s", "bridge")  # fmt: skip


def million(count: int) -> str:
    """Formats a number of parameters in millions."""
    return f"{count / 1e6:,.1f} M"


def head(model: str, origin: str, shape: ModelShape, request: PlanOptions) -> str:
    """Writes the parameters of the model's parts, and the tokens that a caption needs of the longest context."""
    count, budget = shape.parameters(), token_budget(shape, request)
    side = f"; {million(count['bridge'] + shape.text_side)} with its text side" if shape.text_side else ""
    unused = f"; {million(shape.unused)} of the checkpoint are not deployed" if shape.unused else ""
    bridge = f"bridge {million(count['bridge'])} ({shape.bridge}{side}), " if count["bridge"] else "no bridge, "
    frames, visual = budget["frames"], budget["per_item"]
    pictures = f"{frames} pictures: {visual:,}" if frames > 1 else f"{visual:,}"
    if budget["take_slots"]:
        state = "fits" if budget["fits"] else "does not fit"
        use = (
            f"{visual:,} visual + {budget['prompt']} prompt + {budget['new']} new = {budget['slots']:,} of "
            f"{budget['context']:,}: {state}"
        )
    else:
        use = (
            f"the decoder cross-attends to them, so that they take no slots; {budget['prompt']} prompt + "
            f"{budget['new']} new = {budget['slots']:,} of {budget['context']:,}"
        )
    return (
        f"{model} ({shape.family}), {origin}\n"
        f"parameters: {million(count['total'])}: vision {million(count['vision'])}, {bridge}"
        f"language {million(count['language'])}{unused}\n"
        f"tokens: {budget['per_picture']:,} visual tokens a picture ({budget['patches']:,} in the vision encoder), "
        f"{pictures} in all; {use}"
    )


def fits_line(row: PrecisionPlan, usable: int) -> str:
    """Writes one line that says whether a precision runs on the device and fits its memory."""
    if row.refused:
        return f"does not run: {row.refused}"
    if row.fits:
        return f"fits: {size(max(row.memory.total, row.build))} of {size(usable)}"
    lacking = []
    if not row.fits_run:
        lacking.append(f"running needs {size(row.memory.total)}")
    if not row.fits_build:
        lacking.append(f"building needs {size(row.build)}")
    return f"does not fit {size(usable)}: {', '.join(lacking)}"


def device_text(shape: ModelShape, plan: DevicePlan, request: PlanOptions, kernels: KernelShape | None = None) -> str:
    """Writes the tables of one device: memory, times, the steps of ``cuda-decoder``, and bridges.

    ``kernels``: sizes for ``cuda-decoder``; None for those of ``shape``.
    """
    kernels = kernels or known_shape(shape)
    device = plan.device
    state = "measured" if device.measured else "not measured"
    rates = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in device.rates.items())
    lines = [
        (
            f"{device.name} ({state}): {device.title}; {size(device.usable)} usable, {device.bytes_per_s / 1e9:.0f} "
            f"GB/s, tera-operations/s: {rates}"
        ),
        f"  {device.source}",
        "",
    ]
    memory = [
        [
            row.precision,
            *(size(value) for value in vars(row.memory).values()),
            size(row.memory.total),
            size(row.build),
            fits_line(row, device.usable),
        ]
        for row in plan.precisions
    ]
    times = [
        [row.precision, *["–"] * (len(STAGES) + 1)]
        if row.refused
        else [row.precision, *(f"{row.ms[stage]:,.1f}" for stage in STAGES), f"{row.tokens_per_s:,.1f}"]
        for row in plan.precisions
    ]
    lines.append(table(MEMORY_HEADER, memory, right=range(1, 7)))
    lines += ["", "predicted milliseconds", table(TIME_HEADER, times, right=range(1, 8))]
    lines += [
        f"cuda-decoder in {step.precision}: {step.bytes / 1e6:,.0f} MB and {step.launches} launches a token: at least "
        f"{step.least_ms:,.1f} ms at the full bandwidth, {step.step_ms:,.1f} ms predicted; a prompt of "
        f"{step.prefill_tokens} tokens: {step.prefill_ms:,.1f} ms predicted (not measured)"
        for step in kernel_steps(kernels.shape, device, request)
    ]
    if kernels.reason and not device.is_cpu:
        lines.append(f"cuda-decoder: no prediction for this decoder: {kernels.reason}")
    if plan.bridges:
        lines += ["", f"bridges in {plan.chosen}", _bridges(plan)]
    lines += ["", f"recommended bridge: {plan.bridge}: {plan.reason}"]
    return "\n".join(lines)


def fits(shape: ModelShape, plan: DevicePlan, request: PlanOptions) -> bool:
    """Whether the device has the memory to build and run the chosen precision, and the tokens fit the context."""
    return plan.of(plan.chosen).fits and bool(token_budget(shape, request)["fits"])


def what_fits(shape: ModelShape, plan: DevicePlan, request: PlanOptions) -> str:
    """Writes one line for a plan that does not fit: the number of frames, the board or the model that would fit."""
    budget = token_budget(shape, request)
    frames, name = budget["frames"], plan.device.name
    in_context = _most(frames, lambda few: bool(token_budget(shape, replace(request, frames=few))["fits"]))
    ways = []
    few = _most(in_context, lambda few: _fits_at(shape, plan.device, request, few))
    if 0 < few < frames:
        ways.append(f"--frames {few} fits {name}")
    if not plan.of(plan.chosen).fits and in_context:
        at = min(frames, in_context)
        boards = [board for board in DEVICES.values() if _fits_at(shape, board, request, at)]
        if boards:
            board = min(boards, key=lambda one: one.usable).name
            ways.append(f"{board} has enough memory" + (f" for --frames {at}" if at < frames else ""))
    if not few:
        smaller = _smaller_model(shape, plan, request)
        if smaller:
            ways.append(f"the smaller {smaller} fits {name}")
    lacking = "memory" if budget["fits"] else "context"
    return f"does not fit the {lacking}: {'; '.join(ways) or 'no number of frames, board or published model fits'}"


def _fits_at(shape: ModelShape, device: Board, request: PlanOptions, frames: int) -> bool:
    """Whether a device runs the model with this number of frames, in any precision."""
    asked = replace(request, frames=frames)
    return fits(shape, device_plan(shape, device, asked), asked)


def _most(limit: int, able: Callable[[int], bool]) -> int:
    """Returns the largest number up to ``limit`` for which ``able`` is true; 0 if there is none.

    The search is a binary search: if ``able`` is true for a number, it must be true for every smaller number.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if able(middle) else (low, middle - 1)
    return low


def _smaller_model(shape: ModelShape, plan: DevicePlan, request: PlanOptions) -> str:
    """Returns the largest published model with fewer parameters that fits the device; empty if no model fits."""
    found = {}
    for name in PUBLISHED:
        other = shape_of(published_config(name))
        count = other.parameters()["total"]
        if other.family == "blip-vqa":  # it writes answers, not captions
            continue
        if count < shape.parameters()["total"] and _fits_at(
            other, plan.device, request, request.frames or other.frames
        ):
            found[name] = count
    return max(found, key=lambda name: found[name], default="")


def _bridges(plan: DevicePlan) -> str:
    rows = [
        [
            row.kind,
            million(row.parameters),
            f"{row.tokens_per_picture:,}",
            f"{row.tokens:,}",
            "fits" if row.fits_context else "too many",
            "fits" if row.fits_memory else "too little",
            f"{row.ms:,.1f}",
            f"{row.total_ms:,.1f}",
            row.trade_off,
        ]
        for row in plan.bridges
    ]
    return table(BRIDGE_HEADER, rows, right=(1, 2, 3, 6, 7))


def boards_table(plans: Sequence[DevicePlan]) -> str:
    """Makes a table with one line per board: the model in the highest precision that fits the board's memory."""
    rows = []
    for plan in plans:
        row = plan.of(plan.chosen)
        rows.append(
            [
                plan.device.name,
                size(plan.device.usable),
                f"{plan.device.bytes_per_s / 1e9:.0f}",
                row.precision,
                size(row.memory.total),
                size(row.build),
                "fits" if row.fits else "does not fit",
                f"{row.ms['vision']:,.1f}",
                f"{row.ms['prefill']:,.1f}",
                f"{row.ms['decode_per_token']:,.1f}",
                f"{row.ms['total']:,.0f}",
                f"{row.tokens_per_s:,.1f}",
                plan.bridge,
            ]
        )
    text = table(BOARDS_HEADER, rows, right=(1, 2, 4, 5, 7, 8, 9, 10, 11))
    return f"{text}\nnot measured: these are predictions from the makers' figures and a stated efficiency"


def explanation(shape: ModelShape, plan: DevicePlan, request: PlanOptions) -> str:
    """Writes the formulas, with their numbers, that give the times and the memory in the chosen precision."""
    device, precision = plan.device, plan.chosen
    held, row = held_precision(precision, device), plan.of(precision)
    frames = request.frames or shape.frames
    tokens = shape.tokens(frames, request.prompt_tokens)
    counts = ", ".join(f"{name} {count:,}" for name, count in tokens.items() if count)
    share = device.efficiency
    lines = [f"arithmetic of {precision} on {device.name}", f"tokens: {counts}"]
    for part in shape.parts:
        lines += ["", *_part_lines(part, held, tokens)]
        times = frames if part.name in ("vision_encoder", "bridge") else 1
        weights = part.weights(held)
        cost = part_cost(part, weights, device, tokens, times)
        rates = effective(device, weights.kind, cost.bytes)
        ms = part_seconds(part, cost, weights, device, tokens, times) * 1e3
        lines.append(
            f"  time: {'max' if share.overlaps else 'sum'}({cost.float_ops / 1e9:,.2f} G / "
            f"{rates.float_ops_per_s / 1e9:,.0f} G/s + {cost.integer_ops / 1e9:,.2f} G / "
            f"{rates.integer_ops_per_s / 1e9:,.0f} G/s, {cost.bytes / 1e9:,.3f} GB / "
            f"{rates.bytes_per_s / 1e9:,.1f} GB/s) + {times * part.elements(tokens) / 1e6:,.2f} M elements x "
            f"{share.element_s * 1e9:.2f} ns + {operators(part, weights, device)} operators x "
            f"{share.call_s * 1e6:.2f} us = {ms:,.2f} ms"
        )
    lines += ["", *_step_lines(shape, plan, request, tokens), "", *_memory_lines(shape, plan, tokens, request)]
    lines += [
        "",
        "assumed efficiency: products "
        + ", ".join(f"{kind} {value:.0%}" for kind, value in share.products.items())
        + "; bytes "
        + ", ".join(f"{kind} {value:.0%}" for kind, value in share.bytes.items()),
        f"  {share.source}",
        f"{precision} {fits_line(row, device.usable)}",
    ]
    return "\n".join(lines)


def _part_lines(part: ModelPart, held: str, tokens: dict[str, int]) -> list[str]:
    kind = FORMATS[held][part.kind]
    lines = [f"{part.name}: {million(part.parameters)}, weights in {kind} ({WEIGHT_BYTES[kind]:g} bytes each)"]
    for one in part.matrices:
        many = tokens_of(one.rows, tokens)
        bias = f" + {one.outputs:,}" if one.bias else ""
        lines.append(
            f"  {one.name}: {one.count} x ({one.inputs:,} x {one.outputs:,}{bias}) = {one.parameters:,}; "
            f"2 x {one.weights:,} x {many:,} {one.rows} = {one.operations(tokens) / 1e9:,.3f} G operations"
        )
    lines += [
        f"  scores and sums: 4 x {two.count} x {two.width:,} x {tokens_of(two.queries, tokens):,} {two.queries} x "
        f"{tokens_of(two.keys, tokens):,} {two.keys} = {two.operations(tokens) / 1e9:,.3f} G operations"
        for two in part.attentions
    ]
    return [*lines, f"  norms, positions and tables: {part.vectors:,}"]


def _step_lines(shape: ModelShape, plan: DevicePlan, request: PlanOptions, tokens: dict[str, int]) -> list[str]:
    device, precision = plan.device, plan.chosen
    middle = {**tokens, "steps": 1, "context": tokens["context"] + 1 + (request.new_tokens - 1) // 2}
    weights, share = shape.decoder.weights(held_precision(precision, device)), device.efficiency
    cost = step_cost(shape, weights, element_bytes(precision, device), device, middle)
    rates = effective(device, weights.kind, cost.bytes)
    passes = f", read {share.cache_passes} times" if share.cache_passes > 1 else ""
    return [
        (
            f"a token: {'max' if share.overlaps else 'sum'}({(cost.float_ops + cost.integer_ops) / 1e9:,.2f} G "
            f"operations, {cost.bytes / 1e9:,.3f} GB of weights, and of keys and values of {middle['context']:,} tokens"
            f"{passes} / {rates.bytes_per_s / 1e9:,.1f} GB/s) + {operators(shape.decoder, weights, device)} "
            f"operators x {share.call_s * 1e6:.2f} us + Python "
            f"{device.host * HOST_S['decode'] * 1e3:.2f} ms = {plan.of(precision).ms['decode_per_token']:,.2f} ms"
        ),
    ]


def kernel_lines(kernels: KernelShape, device: Board, request: PlanOptions) -> list[str]:
    """Writes the formulas of the predictions for ``cuda-decoder``; empty where there are none."""
    decoder, frames = kernels.shape.decoder, request.frames or kernels.shape.frames
    tokens, lines = kernels.shape.tokens(frames, request.prompt_tokens), [""]
    for step in kernel_steps(kernels.shape, device, request):
        share, held = device.efficiency.bytes[step.precision], held_on_gpu(decoder, step.precision)
        rate = device.bytes_per_s * share
        products, reading, attention = prefill_parts(decoder, device, tokens, held / rate)
        launches = f"{step.launches} launches x {LAUNCH_S * 1e6:g} us"
        lines += [
            (
                f"cuda-decoder in {step.precision}, a token: {step.bytes / 1e6:,.2f} MB / "
                f"({device.bytes_per_s / 1e9:,.0f} GB/s x {share:.0%}) + {launches} = {step.step_ms:,.2f} ms"
            ),
            (
                f"  a prompt: max(products {products * 1e3:,.2f} ms at {tensor_rate(device) / 1e12:,.1f} "
                f"tera-operations/s ({PRODUCT_SHARE:.0%} of the tensor cores' rate with sums in fp32), reading "
                f"{reading * 1e3:,.2f} ms) + attention {attention * 1e3:,.2f} ms + {launches} = "
                f"{step.prefill_ms:,.2f} ms"
            ),
        ]
    return [*lines, ""] if len(lines) > 1 else []


def _memory_lines(shape: ModelShape, plan: DevicePlan, tokens: dict[str, int], request: PlanOptions) -> list[str]:
    row, cache = plan.of(plan.chosen), shape.cache
    element = element_bytes(plan.chosen, plan.device)
    context = tokens["context"] + request.new_tokens
    crossed = f" + {cache.cross:,} x {tokens['source']:,} source" if cache.cross else ""
    held = held_precision(plan.chosen, plan.device)
    parts = " + ".join(f"{part.name} {size(int(part.bytes(held)))}" for part in shape.parts)
    return [
        f"weights: {parts} + token table {size(int(shape.table_bytes(held)))} = {size(row.memory.weights)}",
        (
            f"KV cache: 2 x ({cache.layers} layers x {cache.heads} heads x {cache.head_dim} x {context:,} tokens"
            f"{crossed}) x {element:g} bytes = {size(row.memory.cache)}"
        ),
        (
            f"run: weights + KV cache + activations {size(row.memory.activations)} + process and libraries "
            f"{size(row.memory.workspace)} = {size(row.memory.total)}"
        ),
    ]
