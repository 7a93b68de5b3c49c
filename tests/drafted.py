"""Adds a random draft model to a random checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tokenizers
import torch

from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from blip2edge.training.loading.qformer_texts import QFormerTexts
from tests.drawing import randomize

LENGTH = 24


def add_draft(directory: Path, seed: int = 0) -> CaptionerModel:
    """Puts a draft whose words are the language model's into a checkpoint directory; gives the whole model."""
    plain = load_checkpoint(directory)
    texts = QFormerTexts(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), LENGTH)
    model = CaptionerModel(replace(plain.config, draft=texts.draft_config())).eval()
    torch.manual_seed(seed)
    assert model.draft is not None
    randomize(model.draft)
    with torch.no_grad():
        model.draft.words.weight.normal_(0, 0.7)
        model.draft.positions.weight.normal_(0, 0.7)
    model.load_state_dict(plain.state_dict(), strict=False)
    texts.save(directory)
    save_checkpoint(model, directory, like=directory)
    return model
