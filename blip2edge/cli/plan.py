"""The command ``blip2edge plan``: its flags, and the function that runs it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2edge.cli.flag_groups import add_number, add_queries, add_threads
from blip2edge.cli.next_steps import print_next, quoted

if TYPE_CHECKING:
    import argparse

    from blip2edge.bundle.bundle import Bundle
    from blip2edge.cli.parser import Parser
    from blip2edge.runtime.bench.devices import Board
    from blip2edge.runtime.bench.kernel_steps import KernelShape
    from blip2edge.runtime.bench.plan import DevicePlan, PlanOptions
    from blip2edge.runtime.cuda.layout import DecoderLayout
    from blip2edge.shapes.model_shape import ModelShape

DEFAULT_MODEL = "Salesforce/blip2-opt-2.7b"


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``plan``."""
    parser.add_positional_or_flag(
        "model",
        "-b",
        "--bundle",
        metavar="MODEL",
        nargs="?",
        help="bundle (also hub:ORG/NAME[@REVISION]), checkpoint directory, config.json, or name of a published model "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        action="append",
        default=[],
        help="board to plan for, such as orin-nano-8gb, thor or rtx-4060; the word this: the machine that runs the "
        "command, which is measured; repeat the flag for several boards (default: a table of all boards)",
    )
    add_number(parser, "--frames", "pictures for one caption, such as the frames of a video (default: the model's)")
    add_queries(parser, "of an elastic bridge (default: all)")
    add_number(parser, "--prompt-tokens", "tokens of the prompt, without visual tokens", 8)
    add_number(parser, "--max-new-tokens", "tokens of the caption", 30)
    add_threads(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--explain", action="store_true", help="show how each value is calculated, line by line")
    how.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    parser.add_argument(
        "--require-fit",
        action="store_true",
        help="exit with status 1 if the model does not fit a board of --device, because the memory is too small in "
        "every precision or the context is too short; without this flag, the exit status is 0",
    )


def run(options: argparse.Namespace) -> int:
    """Print whether a model fits the devices, its predicted times, and the recommended bridge.

    Raises:
        UsageError: A value of a flag is wrong, or ``--require-fit`` is given without ``--device``.
        CheckpointError: ``--require-fit`` is given, and the model does not fit a device.
    """
    from blip2edge.cli import plan_text
    from blip2edge.errors import UsageError
    from blip2edge.runtime.bench.devices import DEVICES
    from blip2edge.runtime.bench.kernel_steps import known_shape
    from blip2edge.runtime.bench.plan import PlanOptions, device_plan
    from blip2edge.shapes.sources import find_shape

    if options.require_fit and not options.device:
        raise UsageError("--require-fit needs --device", "name the board that the model must fit")
    request = PlanOptions(options.frames, options.prompt_tokens, options.max_new_tokens, options.threads)
    model = options.model or DEFAULT_MODEL
    shape, origin = find_shape(model, _refused_by_export)
    if options.queries is not None:
        shape = shape.with_queries(options.queries)
    devices = _devices(options.device, request, shape.image_size)
    plans = [device_plan(shape, device, request) for device in devices or DEVICES.values()]
    kernels = _in_kernels(model, shape) if devices or options.json else known_shape(shape)
    if options.json:
        print(json.dumps(plan_json(model, origin, shape, plans, request, kernels), indent=2))
        return _status(options, model, shape, plans, request)
    print(plan_text.head(model, origin, shape, request))
    if devices:
        for plan in plans:
            print(f"\n{plan_text.device_text(shape, plan, request, kernels)}")
            if not plan_text.fits(shape, plan, request):
                print(plan_text.what_fits(shape, plan, request))
            if options.explain:
                print(f"\n{plan_text.explanation(shape, plan, request)}")
                print(*plan_text.kernel_lines(kernels, plan.device, request), sep="\n", end="")
    else:
        print(f"\n{plan_text.boards_table(plans)}")
        if options.explain:
            print(f"\n{plan_text.explanation(shape, plans[0], request)}")
    able = [plan for plan in plans if plan_text.fits(shape, plan, request)] if devices else plans
    if able:
        print_next(*_next(model, able, all_boards=not devices))
    return _status(options, model, shape, plans, request)


def _status(
    options: argparse.Namespace, model: str, shape: ModelShape, plans: list[DevicePlan], request: PlanOptions
) -> int:
    """Returns the exit status 0; raises CheckpointError if ``--require-fit`` is given and a device does not fit."""
    from blip2edge.cli.plan_text import fits, what_fits
    from blip2edge.errors import CheckpointError

    if options.require_fit:
        for plan in plans:
            if not fits(shape, plan, request):
                lacking, _, ways = what_fits(shape, plan, request).partition(": ")
                raise CheckpointError(f"{model} on {plan.device.name}: {lacking}", ways)
    return 0


def plan_json(
    model: str,
    origin: str,
    shape: ModelShape,
    plans: list[DevicePlan],
    request: PlanOptions,
    kernels: KernelShape | None = None,
) -> dict[str, Any]:
    """Makes the JSON object of ``plan --json``; ``kernels``: sizes for ``cuda-decoder`` (None: those of ``shape``)."""
    from blip2edge.runtime.bench.kernel_steps import kernel_steps
    from blip2edge.runtime.bench.plan import token_budget

    devices = []
    known = shape if kernels is None else kernels.shape
    for plan in plans:
        steps = [step.to_json() for step in kernel_steps(known, plan.device, request)]
        devices.append({**plan.to_json(), "cuda_decoder": steps})
    return {
        "model": model,
        "origin": origin,
        "family": shape.family,
        "bridge": shape.bridge,
        "parameters": {**shape.parameters(), "bridge_text_side": shape.text_side, "not_deployed": shape.unused},
        "tokens": token_budget(shape, request),
        "devices": devices,
    }


def _in_kernels(model: str, shape: ModelShape) -> KernelShape:
    """Returns the sizes that ``cuda-decoder`` reads: for a bundle those of its decoder, else those of the config."""
    from dataclasses import replace

    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.hub.names import is_hub_name
    from blip2edge.bundle.manifest import MANIFEST
    from blip2edge.bundle.schema import DECODER
    from blip2edge.errors import Blip2EdgeError
    from blip2edge.runtime.bench.kernel_steps import KernelShape, decoder_part, known_shape

    if shape.cache.cross:
        return known_shape(shape)
    if is_hub_name(model):
        return KernelShape(shape, "its graph is not downloaded; give the directory of the bundle")
    if not (Path(model) / MANIFEST).is_file():
        return known_shape(shape)
    try:
        decoder = decoder_part(_layout(Bundle.open(model)))
    except Blip2EdgeError as error:  # there are no kernels, or a file that only this prediction reads is damaged
        return KernelShape(shape, error.problem)
    parts = tuple(decoder if part.name == DECODER else part for part in shape.parts)
    return KernelShape(replace(shape, parts=parts))


def _layout(bundle: Bundle) -> DecoderLayout:
    """Reads the layout of a bundle's decoder from its copy for ``cuda-decoder``; without a copy, from its graph."""
    from blip2edge.errors import BundleError, MissingPackageError
    from blip2edge.packages import require
    from blip2edge.runtime.backends.optimized_copy import read_copy
    from blip2edge.runtime.cuda.copy_files import NAME, read_layout

    copy = read_copy(bundle, NAME)
    if copy is not None:
        with suppress(BundleError):  # kernels of another version: the graph has the same sizes
            return read_layout(bundle, copy[0])
    require("onnx_ir", "reading its graph", MissingPackageError)
    from blip2edge.optimization.cuda_kernels.of_bundle import layout_of_bundle

    return layout_of_bundle(bundle)


def _refused_by_export(values: Any, source: str, directory: Path | None) -> None:
    """Raises the error with which `export` would refuse a config or a checkpoint; checks nothing without torch."""
    from blip2edge.packages import missing

    if missing(["torch", "transformers"]):
        return
    from blip2edge.model.checkpoint.exportable import check_exportable

    check_exportable(values, source, directory)


def _devices(names: list[str], request: PlanOptions, image_size: int) -> list[Board]:
    from blip2edge.runtime.bench.devices import THIS, find_device
    from blip2edge.runtime.bench.roofline import this_device

    boards = {name: find_device(name) for name in names if name != THIS}  # unknown names first: measuring takes time
    return [this_device(request.threads, image_size) if name == THIS else boards[name] for name in names]


def _next(model: str, plans: list[DevicePlan], *, all_boards: bool) -> list[str]:
    from blip2edge.bundle.hub.names import is_hub_name
    from blip2edge.bundle.manifest import MANIFEST

    if all_boards:
        return [f"blip2edge plan {quoted(Path(model))} --device NAME --explain"]
    chosen = plans[0].chosen
    if is_hub_name(model) or (Path(model) / MANIFEST).is_file():
        return [f"blip2edge bench {quoted(Path(model))}"]
    checkpoint = _checkpoint_of(model)
    if checkpoint is None:
        return []
    precision = "fp32" if chosen == "fp32" else "fp16"
    commands = [f"blip2edge export {quoted(checkpoint)} -o bundle --precision {precision}"]
    if chosen in ("int8", "int4"):
        commands.append(f"blip2edge calibrate bundle -o bundle-{chosen} --images DIR --weights {chosen}")
    return commands


def _checkpoint_of(model: str) -> Path | None:
    """Returns the directory or hub name to give to ``export`` for a planned model; None if there is none."""
    from blip2edge.shapes.families import checkpoint_name
    from blip2edge.shapes.sources import CONFIG

    path = Path(model)
    if not path.exists():
        name = checkpoint_name(model)
        return None if name is None else Path(name)
    folder = path if path.is_dir() else path.parent
    is_config = path.is_dir() or path.name == CONFIG
    return folder if is_config and any(folder.glob("*.safetensors")) else None
