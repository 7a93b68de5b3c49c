"""Writes ``docs/models.md``: ``python benchmarks/models_table.py --write docs/models.md`` (or ``make docs``).

The rows come from the registries (families, bridges, language models). The sizes come from configurations of published
checkpoints in ``blip2edge/shapes/published``, built without weights. The precisions come from
``benchmarks/results/parity.json`` (``python benchmarks/parity.py``), the notes from ``benchmarks/models_notes.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import opened, published
from reporting import parser_of

from blip2edge.choices import PRECISIONS
from blip2edge.cli import run_script
from blip2edge.export.graphs import graphs_of
from blip2edge.export.verify import TOLERANCES
from blip2edge.model.bridges.registry import BRIDGE_BUILDERS
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.registry import FAMILIES
from blip2edge.model.language.registry import bridged_languages
from blip2edge.model.models import Config, build_model
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.model.vision.registry import VISION_ENCODERS
from blip2edge.shapes.families import CONFIGS

HERE = Path(__file__).parent
PARITY = HERE / "results" / "parity.json"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
NOTES = HERE / "models_notes.md"
INTRODUCTION = """\
<!-- Made by `make docs` from the registries, blip2edge/shapes/published and benchmarks/models_notes.md. -->

# Supported models

blip2edge supports any checkpoint in transformers' format whose `config.json` has one of the types below. Before
anything is written, `blip2edge export` compares the names and shapes of its tensors with the configuration.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Returns a Markdown table; the columns whose numbers are in ``right`` are aligned to the right."""
    rule = ["--:" if column in right else "---" for column in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def code(text: str) -> str:
    """Returns a text as code for a table cell; a dash for an empty text."""
    escaped = text.replace("|", "\\|").replace("\n", "\\n")
    return f"`{escaped}`" if text else "–"


def families() -> str:
    """Returns a table with one row for each family of the registry."""
    comparing = {config.family for config in map(opened, map(published, NAMES)) if isinstance(config, RetrievalConfig)}
    rows = []
    for name, family in FAMILIES.items():
        reads = f"{code(family.model_type or name)}"
        if family.architectures:
            reads += f" ({', '.join(family.architectures)})"
        compares = name in comparing
        prompt = "–" if compares else code(family.template)
        question = "–" if compares or not family.question else code(family.question)
        default = code(family.default_prompt or "")
        rows.append([family.title, reads, prompt, default, question])
    head = ["family", "`model_type`", "prompt", "without a prompt", "`ask`"]
    return table(head, rows)


def encoders() -> str:
    """Returns a table with one row for each vision encoder of the registry."""
    rows = []
    for name, row in VISION_ENCODERS.items():
        kinds = ", ".join(code(kind) for kind in (name, *row.within))
        rows.append([row.title, kinds, row.embeds, "yes" if row.resized else "no"])
    return table(["vision encoder", "`model_type`", "embeddings", "other picture sizes"], rows)


ENCODERS = """\
Training puts a bridge between an encoder and a language model: name the encoder's checkpoint in `model.vision_from`.
With an encoder other than BLIP-2's and CLIP's, `train` writes a checkpoint of the `model_type` `blip2edge`, with any
bridge but Flamingo's. The preprocessing is that of the encoder's `preprocessor_config.json`. *Other picture sizes*:
whether the encoder follows a preprocessing that makes pictures of another size than its config names. DINOv2 has
positions for pictures of 518 pixels and a preprocessing that makes 224: its positions are interpolated, once, as
transformers does in every run.

Two keys of the `vision_config` choose other features of a SigLIP or a DINO, with the meaning that they have in LLaVA:
`vision_feature_layer` (-1: the last block without the final norm, -2: the block before) and
`vision_feature_select_strategy` (`default`: without the embeddings before the patches, which are the class token and
the registers). A DINO's feed-forward may be gated (the giant models). Refused by name: SigLIP 2 NaFlex, which reads
pictures of any proportions, and `unfreeze_vision` with one of these encoders.

Tests train a bridge on each of these encoders, export it in fp32 and fp16, check its operators against every version
of TensorRT, and build it with TensorRT for RTX where that is installed.

transformers' image processor of DINOv3 resizes after it rescales, in floating point. Such a bundle does the same: it
has `rescale_first` in the `preprocessing` of its `bundle.json`, which older versions refuse.
"""


def count(parameters: int) -> str:
    """Returns a number of parameters as text, in millions."""
    return f"{parameters / 1e6:,.0f}" if parameters >= 1e7 else f"{parameters / 1e6:.1f}"


def parts(config: Config) -> dict[str, int]:
    """Returns the number of parameters of each part of a model (vision encoder, bridge and so on).

    A shared parameter counts once.
    """
    with torch.device("meta"):
        model = build_model(config)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():  # named_parameters yields a tied parameter once
        part = name.split(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def visual_tokens(config: Config) -> str:
    """Returns the table cell with the number of visual tokens or vectors of a picture."""
    if not isinstance(config, CaptionerConfig):
        vectors = config.num_features
        return f"{vectors} vector{'s' if vectors > 1 else ''}"
    each = config.bridge.num_visual_tokens
    if config.frames > 1:
        return f"{config.frames} × {each}"
    cross = config.language.cross
    if config.bridge.kind == "none":
        return f"{config.vision.num_embeds}, attended to"
    return f"{each}, attended to" if cross is not None and cross.source == "visual_tokens" else str(each)


def passing(name: str, parity: dict[str, Any]) -> str:
    """Returns the precisions that passed the parity check, each with its largest relative difference, as text."""
    found = parity.get(name, {})
    held = []
    for precision in PRECISIONS:
        graphs = found.get(precision, {}).get("graphs", {})
        if found.get(precision, {}).get("passes") and graphs:
            held.append(f"{precision} {max(graph['relative'] for graph in graphs.values()):.0e}")
    return ", ".join(held) or "not measured"


def checkpoints() -> str:
    """Returns a table with one row for each published configuration."""
    parity = json.loads(PARITY.read_text())["results"] if PARITY.is_file() else {}
    rows = []
    for name in NAMES:
        config = opened(published(name))
        size = parts(config)
        kind = config.language.kind if isinstance(config, CaptionerConfig) else config.text.kind
        bridge = config.bridge.kind if isinstance(config, CaptionerConfig) else "–"
        rest = sum(size.values()) - size["vision"] - size.get("bridge", 0)
        rows.append(
            [
                name,
                FAMILIES[config.family].title,
                bridge,
                kind,
                count(size["vision"]),
                count(size["bridge"]) if "bridge" in size else "–",
                count(rest),
                count(sum(size.values())),
                visual_tokens(config),
                f"{config.language.max_positions if isinstance(config, CaptionerConfig) else config.max_positions:,}",
                ", ".join(graphs_of(config)),
                passing(name, parity),
            ]
        )
    head = ["checkpoint", "family", "bridge", "text", "vision, M", "bridge, M", "text, M", "all, M"]
    head += ["a picture", "context", "graphs", "parity"]
    return table(head, rows, right=(4, 5, 6, 7, 9))


EXPLANATION = """\
Parameters are in millions (M); a shared table is counted once. The column *a picture* gives the number of positions
that a picture takes in the language model's input, or of visual tokens that the language model attends to. *Parity*
is the largest difference from torch in any output of any graph, as a share of that output's largest value. It is
measured on the same architecture with a few small random layers (`python benchmarks/parity.py`); the limits are
{bounds}. `attention-pool-opt-2.7b` has the sizes of BLIP-2 and another bridge; no such checkpoint is published.
"""


def document() -> str:
    """Returns the text of docs/models.md."""
    bridges = ", ".join(code(name) for name in BRIDGE_BUILDERS if name != "none")
    models = ", ".join(code(name) for name in bridged_languages())
    bounds = ", ".join(f"{bound:.0e} ({precision})" for precision, bound in TOLERANCES.items())
    rows = f"Bridges: {bridges}. Language models, by their `model_type`: {models}.\n"
    head = [INTRODUCTION, "## Families\n", families(), rows]
    return "\n".join(
        [
            *head,
            "## Vision encoders\n",
            encoders(),
            ENCODERS,
            "## Published checkpoints\n",
            EXPLANATION.format(bounds=bounds),
            checkpoints(),
            NOTES.read_text(),
        ]
    )


def main() -> None:
    """Writes docs/models.md, prints its text, or compares the text with the existing file."""
    parser = parser_of(__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", type=Path, metavar="FILE", help="write the page to FILE")
    how.add_argument("--check", type=Path, metavar="FILE", help="exit 1 unless FILE is up to date")
    options = parser.parse_args()
    page = document()
    if options.write is not None:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(page, encoding="utf-8")
    elif options.check is not None:
        if not options.check.is_file() or options.check.read_text(encoding="utf-8") != page:
            sys.exit(f"{options.check} does not match the registries; run: make docs")
    else:
        print(page, end="")


if __name__ == "__main__":
    run_script(main)
