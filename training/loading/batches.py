"""What the losses read: token ids, masks and labels; and the batches of the miniature's two pretraining phases."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.scenes import PICTURE_SIZE, Scene, scenes
from blip2edge.training.setup.vocabulary import END_ID, PAD_ID, keyword_ids

IGNORED = -100  # label of a position that gives no loss

PREPROCESSING = Preprocessing(size={"height": PICTURE_SIZE, "width": PICTURE_SIZE})  # the rest is BLIP-2's


class CaptionBatch(NamedTuple):
    """Texts for a language model, padded on the right.

    Attributes:
        input_ids: int64 [B, S]: what follows the picture: BOS, prompt, caption, end token, padding. For an
            encoder-decoder model the prompt alone, which its encoder reads.
        attention_mask: int64 [B, S]: 1 where a token is.
        labels: int64 [B, S], or [B, T] for an encoder-decoder model: the caption's tokens and the end token;
            `IGNORED` on everything else. Not shifted, as transformers takes them.
        before_ids: int64 [N]: what stands before the picture, the same in every row; mostly nothing.
        decoder_ids: int64 [B, T]: the start token and the caption, for an encoder-decoder model; None for all others.
        looks: int64 [B, S]: 1 where a slot looks at the picture, for a language model that looks at it from
            between its layers; None for all others.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    before_ids: Tensor
    decoder_ids: Tensor | None = None
    looks: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are to be learned."""
        return int((self.labels != IGNORED).sum())


class TextBatch(NamedTuple):
    """Texts for the Q-Former, padded on the right.

    Attributes:
        input_ids: int64 ``[B, T]``: [CLS], text, [SEP], padding.
        attention_mask: int64 ``[B, T]``, 1 where a token is.
        pictures: int64 ``[B]``, the number of each text's picture: texts with the same number describe the same
            picture, and none is a negative of the other. None where no picture is twice in a batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pictures: Tensor | None = None


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different length as int64 [B, longest], filled on the right."""
    longest = max(1, *map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def caption_batch(prompts: Sequence[Sequence[int]], captions: Sequence[Sequence[int]]) -> CaptionBatch:
    """Prompts and the captions behind them as ids, with the labels of the captions."""
    rows = [[*prompt, *caption] for prompt, caption in zip(prompts, captions, strict=True)]
    labels = [[*[IGNORED] * len(prompt), *caption] for prompt, caption in zip(prompts, captions, strict=True)]
    mask = [[1] * len(row) for row in rows]
    nothing = torch.zeros(0, dtype=torch.int64)
    return CaptionBatch(pad_rows(rows, PAD_ID), pad_rows(mask, 0), pad_rows(labels, IGNORED), nothing)


class KeywordBatch(NamedTuple):
    """Captions of scenes behind the keywords that decide them.

    Attributes:
        sample_ids: B names.
        keyword_ids: int64 [B, Q]: what a perfect bridge would say, one word a visual token, then padding.
        captions: The texts.
    """

    sample_ids: tuple[str, ...]
    keyword_ids: Tensor
    captions: CaptionBatch

    @property
    def weight(self) -> int:
        """Tokens to be learned."""
        return self.captions.tokens


class KeywordTexts:
    """Writes the captions of scenes behind `</s>`, with their keywords.

    Args:
        tokenizer: The miniature's.
        num_query_tokens: Q, how long the row of keywords becomes.
        data: Short prompts, and the share of captions behind one of them.
    """

    def __init__(self, tokenizer: Tokenizer, num_query_tokens: int, data: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._slots = num_query_tokens
        self._keywords = keyword_ids(tokenizer)
        self._data = data

    def _prompt(self, name: str) -> str:
        """Drawn by the scene's name alone, so that it is the same in every run."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if rng.random() >= self._data.prompt_share:
            return ""
        return self._data.prompts[int(rng.integers(len(self._data.prompts)))]

    def __call__(self, batch: Sequence[Scene], names: Sequence[str]) -> KeywordBatch:
        """Makes a batch of scenes."""
        prompts, captions = [], []
        for scene, name in zip(batch, names, strict=True):
            prompt = self._prompt(name)
            text = f" {scene.caption}" if prompt else scene.caption
            prompts.append(self._tokenizer.encode(prompt).ids)
            captions.append([*self._tokenizer.encode(text, add_special_tokens=False).ids, END_ID])
        keywords = [[self._keywords[word] for word in scene.keywords] for scene in batch]
        padded = [row + [PAD_ID] * (self._slots - len(row)) for row in keywords]
        return KeywordBatch(tuple(names), torch.tensor(padded), caption_batch(prompts, captions))


def pixel_values(batch: Sequence[Scene]) -> Tensor:
    """The pictures as the vision encoder wants them: float32 [B, 3, 64, 64].

    The preprocessing is the one that ships.
    """
    return torch.from_numpy(PREPROCESSING.batch([scene.picture for scene in batch]))


class SceneBatches:
    """Endless batches of training scenes, no scene twice.

    Args:
        rows: Scenes a batch on one process.
        series: Which scenes.
        make: From scenes and their names to a batch.
        place: Number of this process, and how many there are: each takes its rows of every batch.
    """

    def __init__(self, rows: int, series: int, make: Any, place: tuple[int, int] = (0, 1)) -> None:
        self._rows, self._series, self._make, self._place = rows, series, make, place
        self._start = 0

    def __next__(self) -> Any:
        """The next batch."""
        rank, size = self._place
        first = self._start + rank * self._rows
        self._start += self._rows * size
        batch = list(scenes(self._rows, seed=self._series, start=first))
        return self._make(batch, [f"scene-{self._series}-{first + number}" for number in range(len(batch))])

    def state_dict(self) -> dict[str, Any]:
        """The number of the next scene."""
        return {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a scene."""
        self._start = int(state["start"])
