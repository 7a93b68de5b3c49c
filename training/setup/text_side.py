"""The text side of a run's Q-Former: whether it has one, and the checkpoint that gives its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from blip2edge.bundle.schema import DRAFT_TOKENIZER_FILE
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.families.registry import FAMILIES
from blip2edge.training.config import TrainingConfig
from blip2edge.training.key_rules import QFORMER_BRIDGES
from blip2edge.training.loading.qformer_texts import QFormerTexts
from blip2edge.training.phases.stage1_checkpoint import STAGE1_FAMILY, Stage1Source
from blip2edge.training.setup import pretrained

QFORMER_TOKENIZER = "qformer_tokenizer/tokenizer.json"  # of InstructBLIP, in its directory


def has_text_side(stage: str, config: TrainingConfig, kept: Stage1Source | None = None) -> bool:
    """Returns whether the Q-Former has its own text modules in this run.

    `kept` is the trained stage-1 model whose Q-Former the run uses; None for a new Q-Former.
    """
    if config.bridge not in QFORMER_BRIDGES:
        return False
    return stage in ("stage1", "instruct") or bool(config.stage1.steps or kept or config.stage2.itg_weight)


def is_retrieval(directory: Path) -> bool:
    """Returns whether a checkpoint is a BLIP-2 for image-text retrieval, the model that stage 1 trains."""
    if not (directory / "config.json").is_file():  # an adapter
        return False
    named = read_checkpoint_json(directory / "config.json").get("architectures")
    return isinstance(named, list) and any(each in FAMILIES[STAGE1_FAMILY].architectures for each in named)


class TextTokenizer(NamedTuple):
    """A tokenizer of the Q-Former's text side.

    Attributes:
        key: The key of ``[model]`` that names the checkpoint with this tokenizer.
        file: The file of the tokenizer.
        alone: Whether the directory has no other tokenizer.
    """

    key: str
    file: Path
    alone: bool


def text_tokenizer(config: TrainingConfig, base: Path) -> TextTokenizer | None:
    """Finds the tokenizer of the Q-Former's text side, in the first of the recipe's checkpoints that has it.

    Returns None if no checkpoint has such a tokenizer.
    """
    for key in ("bridge_from", "checkpoint", "bert"):
        name = getattr(config.model, key)
        if not name:
            continue
        directory = pretrained.resolve(name, base)
        retrieval = is_retrieval(directory)  # its only tokenizer is the text side's
        files = [DRAFT_TOKENIZER_FILE, QFORMER_TOKENIZER, *(["tokenizer.json"] if retrieval else [])]
        for file in files:
            if (directory / file).is_file():
                return TextTokenizer(key, directory / file, retrieval)
        if key == "bert":
            return TextTokenizer(key, directory / "tokenizer.json", alone=False)
    return None


def own_texts(config: TrainingConfig, base: Path) -> QFormerTexts | None:
    """Loads the tokenizer of the Q-Former's text side; returns None if no checkpoint of the recipe has one."""
    found = text_tokenizer(config, base)
    if found is None:
        return None
    return QFormerTexts(pretrained.load_tokenizer(found.file, alone=found.alone), config.stage1.max_tokens)
