"""Makes the language model's training texts: the prompt in the family's template, then the target text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blip2edge.bundle.prompt_spec import INTERLEAVED
from blip2edge.errors import DataError
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.prompts import prompt_spec
from blip2edge.runtime.text.prompt import PromptBuilder
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.data.sources import Sample
from blip2edge.training.loading.batches import IGNORED, CaptionBatch, caption_batch, pad_rows, pad_with_mask
from blip2edge.training.loading.few_shot import Shot, few_shot_prompt

SHORTEST = 2  # shortest target text in tokens: one token and the end token


def captioner_prompts(config: CaptionerConfig, tokenizer: Tokenizer) -> PromptBuilder:
    """Makes the prompt builder of a captioner, which builds the captioner's prompts from texts."""
    language = config.language
    return PromptBuilder(prompt_spec(config), tokenizer, language.max_positions, language.vocab_size)


class CaptionTexts:
    """Makes batches of texts for one captioner.

    Args:
        config: Config of the captioner.
        tokenizer: Tokenizer of the language model.
        max_tokens: Longest target text in tokens, the end token included.
    """

    def __init__(self, config: CaptionerConfig, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._prompts = captioner_prompts(config, tokenizer)
        self._spec = self._prompts.spec
        first = tokenizer.encode("a", add_special_tokens=False)
        start = tokenizer.id_to_token(first[0]) if first else None
        # SentencePiece itself adds a space before a text.
        self._adds_space = (start or "").startswith("\u2581")

    def prompt(self, sample: Sample) -> str | None:
        """Returns the prompt of a sample, or the family's default prompt if the sample has none."""
        return sample.prompt or self._spec.default

    def _whole_prompt(self, sample: Sample) -> str | None:
        """Returns the prompt of a sample, with the sample's few-shot examples before it."""
        shots = [Shot(self.prompt(shot) or "", shot.text) for shot in sample.shots]
        return few_shot_prompt(self._prompts, shots, self.prompt(sample))

    def _caption(self, sample: Sample, room: int) -> list[int]:
        """Returns the token ids of the target text and the end token; at most `room` ids."""
        if room < SHORTEST:
            raise DataError(
                f"the prompt of {sample.sample_id} is too long: it leaves no position for a text in the language"
                f" model's {self._config.language.max_positions} positions",
                "shorten the prompt",
            )
        joined = self.prompt(sample) and not self._adds_space and not self._config.language.is_encoder_decoder
        text = f" {sample.text}" if joined else sample.text
        ids = self._tokenizer.encode(text, add_special_tokens=False)[: room - 1]
        return [*ids, self._config.ends[0]]

    def __call__(self, samples: Sequence[Sample]) -> CaptionBatch:
        """Makes a batch of texts, padded to the longest text.

        Raises:
            PromptError: A prompt is longer than the context of the language model.
            DataError: A prompt leaves no position for the target text, or a few-shot example contains the marker of a
                picture.
        """
        prompts = [self._prompts(self._whole_prompt(sample), len(sample.pictures)) for sample in samples]
        longest = self._config.language.max_positions
        apart = self._config.language.is_encoder_decoder
        captions = []
        for sample, prompt in zip(samples, prompts, strict=True):
            room = longest if apart else longest - prompt.length
            captions.append(self._caption(sample, min(room, self._max_tokens)))
        before = torch.tensor(prompts[0].segments[0] if len(prompts[0].segments) > 1 else (), dtype=torch.int64)
        pad = self._config.pad_token_id or 0
        after = [prompt.segments[-1] for prompt in prompts]
        if apart:
            input_ids, mask = pad_with_mask(after, pad)
            start = self._config.decoder_start_token_id or 0
            decoder_ids = pad_rows([[start, *caption[:-1]] for caption in captions], pad)
            return CaptionBatch(input_ids, mask, pad_rows(captions, IGNORED), before, decoder_ids)
        picture_mask = None
        if self._spec.kind == INTERLEAVED:
            picture_mask = pad_rows(
                [
                    [*(picture + 1 for picture in prompt.attends_to), *[prompt.images] * len(caption)]
                    for prompt, caption in zip(prompts, captions, strict=True)
                ],
                0,
            )
        return caption_batch(after, captions, pad)._replace(before_ids=before, picture_mask=picture_mask)
