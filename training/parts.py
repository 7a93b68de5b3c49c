"""Where a run's parts come from: drawn here as a miniature, or read from checkpoints."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from blip2edge.errors import ConfigError
from blip2edge.model.config import QFormerConfig
from blip2edge.model.instruct import InstructedQFormerConfig
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.training.config import TrainingConfig
from blip2edge.training.miniature import build_miniature, initialise
from blip2edge.training.stage1 import Stage1Model
from blip2edge.training.stage1_start import begin_stage2, load_stage1, save_stage1, start_from_bert
from blip2edge.training.workshop import Workshop


def wants_text(stage: str, config: TrainingConfig) -> bool:
    """Whether the Q-Former has a text side of its own in this run."""
    if config.bridge not in ("qformer", "projection"):
        return False
    if stage == "stage1" or stage == "instruct":
        return True
    return bool(config.stage1.steps or config.model.bridge_from or config.stage2.itg_weight)


def build(stage: str, config: TrainingConfig, base: Path) -> Workshop:
    """The workshop of a run.

    Args:
        stage: What is to be run.
        config: The recipe.
        base: Where its relative paths start.

    Raises:
        ConfigError: The parts do not go together.
        CheckpointError: One cannot be read.
    """
    instructed = stage == "instruct"
    draft = wants_text(stage, config) and not instructed
    workshop = build_miniature(config, draft=draft, instructed=instructed)
    if config.model.bridge_from:
        begin_stage2(load_stage1(base / config.model.bridge_from), workshop.model)
    return workshop


def first_stage(workshop: Workshop, config: TrainingConfig) -> Stage1Model:
    """A fresh model of stage 1 around the workshop's picture encoder.

    Raises:
        ConfigError: The bridge is no Q-Former.
        CheckpointError: The recipe's BERT cannot be read, or has other sizes.
    """
    bridge, texts = workshop.model.config.bridge, workshop.texts
    if not isinstance(bridge, QFormerConfig) or texts is None:
        raise ConfigError(
            f"stage1 trains a Q-Former, and bridge is {config.bridge!r}", "set bridge to 'qformer'"
        )
    draft = texts.draft_config()
    own: dict[str, Any] = {each.name: getattr(bridge, each.name) for each in fields(QFormerConfig)}
    text = InstructedQFormerConfig(
        **own, vocab_size=draft.vocab_size, instruction_positions=draft.max_positions
    )
    model = Stage1Model(
        RetrievalConfig(
            family="blip-2-itm",
            vision=workshop.model.config.vision,
            text=text,
            embed_dim=config.stage1.embed_dim,
            max_positions=draft.max_positions,
            num_features=bridge.num_query_tokens,
        ),
        draft,
    )
    generator = torch.Generator().manual_seed(config.seed)
    if config.model.bert:
        start_from_bert(model, config.model.bert, generator)
    else:
        initialise(model, config.seed)
    return model


def write_stage1(workshop: Workshop, model: Stage1Model, directory: Path) -> None:
    """Writes what stage 1 made, with its tokenizer and preprocessing."""
    save_stage1(model, directory)
    workshop.write_files(directory)
    if workshop.texts is not None:
        workshop.texts.save(directory)
