"""A reader: a language model that answers questions from a caption alone, without the picture.

If the reader's answers are right, the caption contains what the questions are about. The idea is that of QACE (Lee et
al., arXiv 2108.12560), but the questions are those of a data set, not generated questions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.hub.download import find_bundle
from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.schema import CROSS_KV, TEXT_ENCODER
from blip2edge.errors import PromptError, UsageError, option
from blip2edge.runtime.backends.base import check_threads
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import EncodedBatch, StageClock
from blip2edge.runtime.captioning.pipeline import TextGenerator
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.text.prompt import Prompt
from blip2edge.training.evaluation.models import ModelOptions, compares_only, needs_picture, unsigned_checkpoint

TEMPLATE = "Picture: {caption}\nQuestion: {question}\nShort answer:"
"""The reader's prompt. ``{caption}`` is replaced by nothing if the reader answers without a caption."""

FIELDS = ("{caption}", "{question}")

MAX_ANSWER_TOKENS = 10
"""Largest number of tokens of an answer; the limit of LAVIS in VQA."""

STOP = "\n"
"""The text that ends an answer."""


class Reader:
    """Answers questions from captions, with a language model and greedy decoding.

    Args:
        generator: Language model and tokenizer.
        ends: Token ids that end a text.
        batch_size: Number of texts in one batch.
        template: The prompt of a question, with the two :data:`FIELDS`.

    Raises:
        UsageError: The template lacks a field.
    """

    def __init__(
        self, generator: TextGenerator, ends: Sequence[int], batch_size: int, template: str = TEMPLATE
    ) -> None:
        check_template(template)
        self._generator = generator
        self._options = GenerationOptions(
            max_new_tokens=MAX_ANSWER_TOKENS, eos_token_ids=tuple(ends), stop=(STOP,), draft="none"
        )
        self._batch_size = batch_size
        self._template = template

    def __call__(self, captions: Sequence[str], questions: Sequence[str]) -> list[str]:
        """Answers one question for each caption, from the caption alone; returns the answers.

        Raises:
            PromptError: The context of the language model has no room for a prompt and its answer.
        """
        prompts = [
            self._prompt(filled(self._template, caption, question))
            for caption, question in zip(captions, questions, strict=True)
        ]
        answers: list[str] = []
        for start in range(0, len(prompts), self._batch_size):
            part = prompts[start : start + self._batch_size]
            batch = EncodedBatch(part, {}, [1] * len(part))
            rows = range(start, start + len(part))
            generated = self._generator.complete(batch, self._options, rows, StageClock())
            answers += [self._generator.text(one, self._options) for one in generated]
        return answers

    def _prompt(self, text: str) -> Prompt:
        ids = self._generator.tokenizer.encode(text)
        prompt = Prompt((tuple(ids),), 0, None)
        size = self._generator.max_positions
        if len(ids) > size or self._generator.limited(prompt, self._options) != self._options:
            raise PromptError(
                f"the reader's prompt has {len(ids)} tokens and its answer up to {MAX_ANSWER_TOKENS}, but its context"
                f" has {size}",
                f"take a reader with a longer context, or a shorter {option('reader_prompt')}",
            )
        return prompt


def check_template(template: str) -> None:
    """Checks that a prompt template contains the two :data:`FIELDS`.

    Raises:
        UsageError: The template lacks a field.
    """
    for name in FIELDS:
        if name not in template:
            raise UsageError(f"expected {option('reader_prompt')} to contain {name}, got {template!r}")


def filled(template: str, caption: str, question: str) -> str:
    """Returns the prompt: the template with caption and question filled in. Braces inside these texts are kept."""
    values = dict(zip(FIELDS, (caption, question), strict=True))
    return re.sub("|".join(map(re.escape, FIELDS)), lambda found: values[found[0]], template)


def open_reader(path: Path, options: ModelOptions, template: str = TEMPLATE) -> Reader:
    """Opens a reader: the language model of a bundle, of a captioner's checkpoint, or of a language model's checkpoint.

    Args:
        path: A bundle, also by its name on the hub, or a checkpoint directory.
        options: How the model is run; its generation options are not used.
        template: The prompt of a question.

    Raises:
        UsageError: The model has no language model, or one that does not work without a picture; the template lacks a
            field; or a signature is required and `path` is a checkpoint.
        BundleError, CheckpointError: The model cannot be read.
    """
    path = find_bundle(path, public_key=options.require_signature)
    if not (path / MANIFEST).is_file():
        if options.require_signature is not None:
            raise unsigned_checkpoint(path)
        # Imported here: it needs torch, which a machine that only runs bundles does not have.
        from blip2edge.training.evaluation.checkpoints.reader import checkpoint_generator

        generator, ends = checkpoint_generator(path, options)
        return Reader(generator, ends, options.batch_size, template)
    check_threads(options.threads)
    bundle = Bundle.open(path, require_signature=options.require_signature)
    if bundle.manifest.prompt is None:
        raise compares_only(path)
    graphs = bundle.manifest.graphs
    if CROSS_KV in graphs and TEXT_ENCODER not in graphs:
        raise needs_picture(path)
    if TEXT_ENCODER in graphs and "image_embeds" in [one.name for one in bundle.graph(TEXT_ENCODER).spec.inputs]:
        raise needs_picture(path)
    captioner = Captioner(bundle, options.backend, options.threads, "none")
    return Reader(captioner.generator, bundle.manifest.generation["eos_token_ids"], options.batch_size, template)
