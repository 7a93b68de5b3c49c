"""Loads a checkpoint's language model in torch as a reader, which answers questions from captions alone."""

from __future__ import annotations

from pathlib import Path

import torch

from blip2edge.model.checkpoint.stored.files import find_checkpoint, read_checkpoint_json
from blip2edge.model.families.registry import read_config
from blip2edge.model.language.registry import LANGUAGES, language_of
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.runtime.captioning.pipeline import TextGenerator
from blip2edge.runtime.decoding.confidence import Confidence
from blip2edge.runtime.decoding.draft_model import DraftSelector
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.evaluation.checkpoints.decoding import TorchLanguage
from blip2edge.training.evaluation.checkpoints.models import device_for
from blip2edge.training.evaluation.models import ModelOptions, compares_only, needs_picture
from blip2edge.training.setup.pretrained import build_language, open_language


def checkpoint_generator(directory: Path, options: ModelOptions) -> tuple[TextGenerator, tuple[int, ...]]:
    """Loads the language model of a checkpoint.

    Args:
        directory: A checkpoint of a language model or of a captioner.
        options: Backend (auto, cpu or cuda) and threads.

    Returns:
        The text generator of the language model, and the token ids that end a text.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        UsageError: The model has no language model, or one that does not work without a picture.
    """
    device = device_for(options.backend)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    directory = find_checkpoint(directory)
    values = read_checkpoint_json(directory / "config.json")
    named = LANGUAGES.get(str(values.get("model_type")))
    if named is not None and not named.bridged:
        raise needs_picture(directory)
    if named is None and isinstance(read_config(values), RetrievalConfig):
        raise compares_only(directory)
    part = open_language(str(directory.absolute()), directory)
    config = part.config
    if not language_of(config.kind).bridged:
        raise needs_picture(directory)
    language = TorchLanguage(
        build_language(part).requires_grad_(False).to(device), config, part.tokens.get("decoder_start_token_id")
    )
    generator = TextGenerator(
        language, Tokenizer(part.tokenizer), config.max_positions, DraftSelector(default="none"), Confidence(None)
    )
    return generator, tuple(part.tokens.get("eos_token_ids") or ())
