"""Makes batches of texts (token ids, masks, labels), and batches of scenes for the miniature's pretraining."""

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
from blip2edge.training.data.sources import draw_prompt
from blip2edge.training.setup.vocabulary import END_ID, PAD_ID, keyword_ids

IGNORED = -100  # label of a position without loss

PREPROCESSING = Preprocessing(size={"height": PICTURE_SIZE, "width": PICTURE_SIZE})  # the rest is BLIP-2's


class CaptionBatch(NamedTuple):
    """Texts for a language model, padded on the right.

    Attributes:
        input_ids: int64 [B, S]: the tokens after the picture: BOS, prompt, caption, end token, padding. For an
            encoder-decoder model, the prompt only (the input of its encoder).
        attention_mask: int64 [B, S]: 1 for tokens, 0 for padding.
        labels: int64 [B, S], or [B, T] for an encoder-decoder model: the tokens of the caption and the end token;
            `IGNORED` elsewhere. Not shifted, as in transformers.
        before_ids: int64 [N]: the tokens before the picture, equal in all rows; usually empty.
        decoder_ids: int64 [B, T]: for an encoder-decoder model, the start token and the caption; else None.
        picture_mask: int64 [B, S]: for a language model with cross-attention, the number (from 1) of the picture that
            each token attends to; 0 if a token attends to no picture. None if all tokens attend to one picture, and for
            language models without cross-attention.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    before_ids: Tensor
    decoder_ids: Tensor | None = None
    picture_mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Returns the number of tokens on which the loss is computed."""
        return int((self.labels != IGNORED).sum())


class TextBatch(NamedTuple):
    """Texts for the Q-Former, padded on the right.

    Attributes:
        input_ids: int64 ``[B, T]``: [CLS], text, [SEP], padding.
        attention_mask: int64 ``[B, T]``, 1 for tokens, 0 for padding.
        pictures: int64 ``[B]``, number of each text's picture. Texts with the same number describe the same picture
            and are not used as negatives of each other. None if all pictures of a batch differ.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pictures: Tensor | None = None


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pads rows on the right with `value`; returns int64 [B, length of the longest row]."""
    longest = max(1, *map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def pad_with_mask(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pads token ids on the right. Returns ids and attention mask, int64 [B, length of the longest row] each."""
    return pad_rows(rows, pad_id), pad_rows([[1] * len(row) for row in rows], 0)


def caption_batch(
    prompts: Sequence[Sequence[int]], captions: Sequence[Sequence[int]], pad_id: int = PAD_ID
) -> CaptionBatch:
    """Makes a batch of prompts and captions, given as token ids; no tokens come before the picture."""
    rows = [[*prompt, *caption] for prompt, caption in zip(prompts, captions, strict=True)]
    labels = [[*[IGNORED] * len(prompt), *caption] for prompt, caption in zip(prompts, captions, strict=True)]
    before_ids = torch.zeros(0, dtype=torch.int64)
    return CaptionBatch(*pad_with_mask(rows, pad_id), pad_rows(labels, IGNORED), before_ids)


class KeywordBatch(NamedTuple):
    """Captions of scenes, with the seven keywords that determine each caption.

    Attributes:
        sample_ids: Names of the B samples.
        keyword_ids: int64 [B, Q]: one keyword for each visual token, then padding.
        captions: The captions.
    """

    sample_ids: tuple[str, ...]
    keyword_ids: Tensor
    captions: CaptionBatch

    @property
    def weight(self) -> int:
        """Returns the number of tokens that the loss is computed on."""
        return self.captions.tokens


class KeywordTexts:
    """Makes batches of scene captions with the keywords of each caption.

    Args:
        tokenizer: The miniature's tokenizer.
        num_query_tokens: Q, the number of visual tokens, to which the keywords are padded.
        data: Section [data] of the recipe: short prompts, and the share of captions that follow a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, num_query_tokens: int, data: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._num_query_tokens = num_query_tokens
        self._keywords = keyword_ids(tokenizer)
        self._data = data

    def _prompt(self, name: str) -> str:
        """Draws the prompt of a scene. The draw depends only on the scene's name, so all runs give the same prompt."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return draw_prompt(self._data, rng)

    def __call__(self, batch: Sequence[Scene], names: Sequence[str]) -> KeywordBatch:
        """Makes a batch of the captions and keywords of scenes."""
        prompts, captions = [], []
        for scene, name in zip(batch, names, strict=True):
            prompt = self._prompt(name)
            text = f" {scene.caption}" if prompt else scene.caption
            prompts.append(self._tokenizer.encode(prompt).ids)
            captions.append([*self._tokenizer.encode(text, add_special_tokens=False).ids, END_ID])
        keywords = [[self._keywords[word] for word in scene.keywords] for scene in batch]
        padded = [row + [PAD_ID] * (self._num_query_tokens - len(row)) for row in keywords]
        return KeywordBatch(tuple(names), torch.tensor(padded), caption_batch(prompts, captions))


def pixel_values(batch: Sequence[Scene]) -> Tensor:
    """Preprocesses the pictures of scenes; returns pixel values, float32 [B, 3, 64, 64]."""
    return torch.from_numpy(PREPROCESSING.batch([scene.picture for scene in batch]))


class SceneBatches:
    """Yields batches of training scenes, without end. No scene is used twice.

    Args:
        rows: Number of scenes of a batch on one process.
        series: Seed of the scenes.
        make: Function that makes a batch from scenes and their names.
        place: Rank of this process and number of processes; each process uses its own rows of every batch.
    """

    def __init__(self, rows: int, series: int, make: Any, place: tuple[int, int] = (0, 1)) -> None:
        self._rows, self._series, self._make, self._place = rows, series, make, place
        self._start = 0

    def __next__(self) -> Any:
        """Returns the next batch: this process' rows."""
        rank, size = self._place
        first = self._start + rank * self._rows
        self._start += self._rows * size
        batch = list(scenes(self._rows, seed=self._series, start=first))
        return self._make(batch, [f"scene-{self._series}-{first + number}" for number in range(len(batch))])

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of the next scene."""
        return {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the scene that `state_dict` returned."""
        self._start = int(state["start"])
