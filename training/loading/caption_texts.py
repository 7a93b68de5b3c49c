"""Samples' texts as the language model reads them: the family's own prompt, then what is to be learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blip2edge.bundle.schema import INTERLEAVED
from blip2edge.errors import DataError
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.prompts import prompt_spec
from blip2edge.runtime.text.prompt import PromptBuilder
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.data.sources import Sample
from blip2edge.training.loading.batches import IGNORED, CaptionBatch, pad_rows

SHORTEST = 2  # tokens that must be left for a caption: one and the end


class CaptionTexts:
    """Makes batches of texts for one captioner.

    Args:
        config: The captioner's.
        tokenizer: Its language model's.
        max_tokens: Longest text to be learned, the end token included.
    """

    def __init__(self, config: CaptionerConfig, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._spec = prompt_spec(config)
        language = config.language
        self._prompter = PromptBuilder(self._spec, tokenizer, language.max_positions, language.vocab_size)
        first = tokenizer.encode("a", add_special_tokens=False)
        start = tokenizer.id_to_token(first[0]) if first else None
        self._adds_space = (start or "").startswith(
            "\u2581"
        )  # SentencePiece begins a text with a space itself

    def prompt(self, sample: Sample) -> str | None:
        """A sample's prompt, or the family's own where it has none."""
        return sample.prompt or self._spec.default

    def _caption(self, sample: Sample, room: int) -> list[int]:
        """What is learned, behind its prompt."""
        if room < SHORTEST:
            raise DataError(
                f"the prompt of {sample.sample_id} leaves no room for a text in the language model's"
                f" {self._config.language.max_positions} positions"
            )
        joined = self.prompt(sample) and not self._adds_space and not self._config.language.is_encoder_decoder
        text = f" {sample.text}" if joined else sample.text
        ids = self._tokenizer.encode(text, add_special_tokens=False)[: room - 1]
        return [*ids, self._config.eos_token_ids[0]]

    def __call__(self, samples: Sequence[Sample]) -> CaptionBatch:
        """A batch, as long as its longest text.

        Raises:
            PromptError: A prompt is longer than the context.
            DataError: It leaves no room for a text.
        """
        prompts = [self._prompter(self.prompt(sample)) for sample in samples]
        longest = self._config.language.max_positions
        apart = self._config.language.is_encoder_decoder
        captions = []
        for sample, prompt in zip(samples, prompts, strict=True):
            room = longest if apart else longest - prompt.length
            captions.append(self._caption(sample, min(room, self._max_tokens)))
        before = torch.tensor(
            prompts[0].segments[0] if len(prompts[0].segments) > 1 else (), dtype=torch.int64
        )
        pad = self._config.pad_token_id or 0
        behind = [list(prompt.segments[-1]) for prompt in prompts]
        if apart:
            mask = pad_rows([[1] * len(row) for row in behind], 0)
            start = self._config.decoder_start_token_id or 0
            written = pad_rows([[start, *caption[:-1]] for caption in captions], pad)
            return CaptionBatch(pad_rows(behind, pad), mask, pad_rows(captions, IGNORED), before, written)
        rows = [[*prompt, *caption] for prompt, caption in zip(behind, captions, strict=True)]
        labels = [
            [*[IGNORED] * len(prompt), *caption] for prompt, caption in zip(behind, captions, strict=True)
        ]
        mask = pad_rows([[1] * len(row) for row in rows], 0)
        looks = None
        if self._spec.kind == INTERLEAVED:
            seen = [[int(look >= 0) for look in prompt.attends_to] for prompt in prompts]
            looks = pad_rows(
                [[*row, *[1] * len(caption)] for row, caption in zip(seen, captions, strict=True)], 0
            )
        return CaptionBatch(pad_rows(rows, pad), mask, pad_rows(labels, IGNORED), before, looks=looks)
