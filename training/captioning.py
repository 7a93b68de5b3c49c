"""Captions straight from a checkpoint in torch, for evaluation while nothing is exported yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from blip2edge.errors import CheckpointError
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint import load_checkpoint, read_json
from blip2edge.runtime.preprocess import Preprocessing
from blip2edge.runtime.tokenizer import Tokenizer
from blip2edge.training.evaluate import CaptionMany


class CheckpointCaptioner:
    """Greedy captions of a torch model: the oracle that a bundle is compared with.

    Args:
        model: In eval mode.
        tokenizer: Of the same vocabulary.
        preprocessing: As the vision encoder was trained.
        max_new_tokens: Longest caption, the end token included.

    Raises:
        CheckpointError: The language model has no token that begins a text.
    """

    def __init__(
        self,
        model: CaptionerModel,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        max_new_tokens: int = 20,
    ) -> None:
        if model.config.bos_token_id is None:
            raise CheckpointError("expected a language model with a bos_token_id, config.json has none")
        self._bos = model.config.bos_token_id
        self._ends = torch.tensor(model.config.eos_token_ids)
        self._model = model
        self._tokenizer = tokenizer
        self._preprocessing = preprocessing
        self._max_new_tokens = max_new_tokens

    @classmethod
    def load(cls, directory: str | Path, max_new_tokens: int = 20) -> CheckpointCaptioner:
        """Reads a checkpoint directory.

        Args:
            directory: Config, weights, tokenizer and preprocessing of a `Blip2ForConditionalGeneration`.
            max_new_tokens: Longest caption, the end token included.

        Returns:
            The captioner.

        Raises:
            CheckpointError: Something is missing or does not fit.
        """
        path = Path(directory)
        preprocessing = Preprocessing.from_hf(read_json(path / "preprocessor_config.json"))
        tokenizer = Tokenizer.from_file(path / "tokenizer.json")
        return cls(load_checkpoint(path), tokenizer, preprocessing, max_new_tokens)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Captions of pictures, in order, for the empty prompt.

        Args:
            pictures: B of them, RGB.

        Returns:
            B captions.
        """
        visual_tokens = self._model.visual_tokens(torch.from_numpy(self._preprocessing.batch(pictures)))
        rows = len(pictures)
        token_ids = torch.full((rows, 1), self._bos)
        finished = torch.zeros(rows, dtype=torch.bool)
        for _ in range(self._max_new_tokens):
            # No cache, on purpose: the plainest decoding there is, and quick enough for short captions.
            following: Tensor = self._model(visual_tokens, token_ids)[:, -1].argmax(dim=-1)  # [B]
            following = torch.where(finished, self._ends[0], following)
            token_ids = torch.cat([token_ids, following[:, None]], dim=1)
            finished |= torch.isin(following, self._ends)
            if bool(finished.all()):
                break
        return [self._tokenizer.decode(row).strip() for row in token_ids[:, 1:].tolist()]


def checkpoint_captioner(directory: str | Path, batch_size: int = 16) -> CaptionMany:
    """What `evaluate_scenes` wants, for a checkpoint.

    Args:
        directory: A checkpoint directory.
        batch_size: Pictures at once.

    Returns:
        From pictures to captions, in order; greedy, empty prompt.

    Raises:
        CheckpointError: The directory cannot be read.
    """
    captioner = CheckpointCaptioner.load(directory)

    def caption_many(pictures: Sequence[Image.Image]) -> list[str]:
        chunks = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
        return [text for chunk in chunks for text in captioner(chunk)]

    return caption_many
