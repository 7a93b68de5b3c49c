"""The command ``blip2edge train``: its flags, and the function that runs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.choices import TRAINING_STAGES
from blip2edge.cli import interrupt
from blip2edge.cli.flag_groups import add_output
from blip2edge.cli.messages import print_note
from blip2edge.cli.next_steps import print_next, quoted
from blip2edge.errors import plural
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``train``."""
    parser.add_argument(
        "stage",
        choices=TRAINING_STAGES,
        help="stage1: train the Q-Former on pictures with texts, without the language model; stage2: train the bridge, "
        "for example the Q-Former and its projection, with the caption loss of the language model (vision encoder and "
        "language model stay frozen by default); instruct: as stage2, and the Q-Former also reads the prompt",
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", type=Path, required=True, help="recipe of the training, a TOML or JSON file"
    )
    add_output(
        parser,
        "DIR",
        "directory of the new checkpoint (default: runs/NAME for NAME.toml)",
        required=False,
        force="replace {} if it exists and train wrote it, and start from the beginning",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the last snapshot even if FILE has changed; if FILE is unchanged, training always resumes",
    )


def run(options: argparse.Namespace) -> int:
    """Train one stage of the recipe, and print the path of the checkpoint."""
    from blip2edge.bundle.outputs.publishing import check_output

    output = options.output or Path("runs") / options.config.stem
    from blip2edge.training.config import RECORD_FILE, in_recipe, load_config
    from blip2edge.training.inputs import check_output_apart, check_recipe_files

    check_output(output, options.force, RECORD_FILE, options.config)
    # A wrong recipe and missing files are refused before torch is imported, which takes seconds.
    config = load_config(options.config)
    base = options.config.resolve().parent
    check_output_apart(output, config, base, options.stage)
    with in_recipe(options.config):
        check_recipe_files(config, base, options.stage)
    from blip2edge.training.run import train

    first = not int(os.environ.get("RANK", "0"))  # of several processes, only the first prints
    try:
        with Progress() as progress:
            record = train(
                options.stage,
                options.config,
                output,
                resume=options.resume,
                force=options.force,
                log=progress.note,
                progress=progress,
            )
    except (KeyboardInterrupt, interrupt.Interrupted):
        if first:
            print_note(_how_to_go_on(options, output))
        raise
    if not first:
        return 0
    print(f"{output}: {record['parameters']} parameters, trained in {seconds(record['seconds'])} s")
    for phase, figures in record["phases"].items():
        for name, problem in figures.get("broken", {}).get("first", {}).items():
            print(f"{phase}: skipped {name}: {problem} ({plural(figures['broken']['samples'], 'sample')} in all)")
    scores = record.get("heldout")
    if scores:
        print(f"{scores['n']} held-out scenes: {scores['exact_match']:.2%} exact captions")
    print_next(f"blip2edge export {quoted(output)} -o BUNDLE")
    return 0


def seconds(value: float) -> str:
    """Returns seconds as text: with a decimal place below ten, so that a short run does not show 0."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _how_to_go_on(options: argparse.Namespace, output: Path) -> str:
    """Returns a sentence that says from which step the training can be resumed, and with which command."""
    from blip2edge.training.run import snapshots_of

    snapshots = snapshots_of(output)
    position = snapshots.position
    if position is None:
        return "no snapshot was written yet, so the same command starts from the beginning; see loop.snapshot_every"
    flags = " --force --resume" if options.force else " --resume" if options.resume else ""
    command = f"blip2edge train {options.stage} -c {quoted(options.config)} -o {quoted(output)}{flags}"
    processes, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes > 1:
        launcher = f"torchrun --nproc-per-node {local} -m " if processes == local else "the same launcher and "
        command = f"{launcher}{command}"
    return f"the snapshot of {position} is in {snapshots.directory}; resume with: {command}"
