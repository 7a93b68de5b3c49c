"""From scenes to what the losses read: token ids, masks, labels and pixel values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from blip2edge.runtime.preprocess import Preprocessing
from blip2edge.training.data.config import DataConfig
from blip2edge.training.scenes import PICTURE_SIZE, Scene, scenes
from blip2edge.training.vocabulary import END_ID, PAD_ID, keyword_ids

IGNORED = -100  # label of a position that gives no loss

PREPROCESSING = Preprocessing(size={"height": PICTURE_SIZE, "width": PICTURE_SIZE})  # the rest is BLIP-2's


@dataclass(frozen=True)
class CaptionBatch:
    """Texts, padded on the right, and what belongs to them.

    Args:
        input_ids: int64 [B, S]: `</s>`, prompt, caption, `</s>`, padding.
        attention_mask: int64 [B, S]: 1 where a token is.
        labels: int64 [B, S]: the caption's tokens and the final `</s>`; `IGNORED` on the first `</s>`, the
            prompt and the padding. Not shifted, as transformers takes them.
        keyword_ids: int64 [B, Q]: what a perfect bridge would say, one word a visual token, then padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    keyword_ids: Tensor


class Collator:
    """Writes captions behind prompts, and pads.

    Args:
        tokenizer: The miniature's.
        data: Prompts and their share.
        num_query_tokens: Q, how long the row of keywords becomes.
    """

    def __init__(self, tokenizer: Tokenizer, data: DataConfig, num_query_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._slots = num_query_tokens
        self._keywords = keyword_ids(tokenizer)

    def _text(self, scene: Scene, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Prompt and caption of one scene as ids; the prompt starts with `</s>`, the caption ends with it."""
        prompt = ""
        if rng.random() < self._data.prompt_share:
            prompt = self._data.prompts[int(rng.integers(len(self._data.prompts)))]
        caption = f" {scene.caption}" if prompt else scene.caption
        return (
            self._tokenizer.encode(prompt).ids,
            [*self._tokenizer.encode(caption, add_special_tokens=False).ids, END_ID],
        )

    def __call__(self, batch: Sequence[Scene], rng: np.random.Generator) -> CaptionBatch:
        """Makes a batch.

        Args:
            batch: B scenes.
            rng: Chooses the prompts.

        Returns:
            The batch, as long as its longest text.
        """
        texts = [self._text(scene, rng) for scene in batch]
        length = max(len(prompt) + len(caption) for prompt, caption in texts)
        input_ids = torch.full((len(texts), length), PAD_ID)
        labels = torch.full((len(texts), length), IGNORED)
        mask = torch.zeros((len(texts), length), dtype=torch.int64)
        for row, (prompt, caption) in enumerate(texts):
            end = len(prompt) + len(caption)
            input_ids[row, :end] = torch.tensor(prompt + caption)
            labels[row, len(prompt) : end] = torch.tensor(caption)
            mask[row, :end] = 1
        keywords = [[self._keywords[word] for word in scene.keywords] for scene in batch]
        padded = [row + [PAD_ID] * (self._slots - len(row)) for row in keywords]
        return CaptionBatch(input_ids, mask, labels, torch.tensor(padded))


def pixel_values(batch: Sequence[Scene]) -> Tensor:
    """The pictures as the vision encoder wants them: float32 [B, 3, 64, 64].

    The preprocessing is the one that ships.
    """
    return torch.from_numpy(PREPROCESSING.batch([scene.picture for scene in batch]))


def scene_batches(batch_size: int, *, seed: int) -> Iterator[list[Scene]]:
    """Endless batches of training scenes, no scene twice.

    Args:
        batch_size: Scenes a batch.
        seed: The series.

    Yields:
        Batches in the order of the series.
    """
    start = 0
    while True:
        yield list(scenes(batch_size, seed=seed, start=start))
        start += batch_size
