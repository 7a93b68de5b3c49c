"""Checkpoints as they are scored, in torch: no export, no cache, greedy. The oracle that a bundle's figures face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip2edge.bundle.schema import TOKENIZER_FILE
from blip2edge.errors import CheckpointError, UsageError, option
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import load_model, read_json
from blip2edge.model.families.registry import FAMILIES
from blip2edge.model.language.bert import BertDecoder
from blip2edge.model.retrieval import RetrievalModel
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.text.prompt import Instructor, Prompt, Prompter
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.evaluation.judges import Judge, JudgeOptions, Texts, Vectors
from blip2edge.training.loading.batches import pad_rows
from blip2edge.training.loading.texts import prompt_spec

Step = Callable[[Tensor], Tensor]
"""From the ids written so far [B, N] to the logits of the next [B, V]."""

MAX_NEW_TOKENS = 30  # as in a bundle that was exported of it
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class CheckpointAnswerer:
    """A captioner in torch.

    Args:
        model: In eval mode.
        tokenizer: Of its language model.
        preprocessing: As its picture encoder was trained.
        instructions: The Q-Former's tokenizer, where it reads the prompt.
        batch_size: Pictures at once.
        max_new_tokens: Longest text, the end token included.

    Raises:
        UsageError: A model of videos, or one whose text encoder looks at the picture.
    """

    def __init__(
        self,
        model: CaptionerModel,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        instructions: Tokenizer | None = None,
        *,
        batch_size: int = 16,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        config = model.config
        self._language: Any = model.language
        reader = isinstance(model.language, BertDecoder) and config.language.is_encoder_decoder
        if config.frames > 1 or reader:
            raise UsageError(
                f"a checkpoint of the family {config.family} is scored as a bundle",
                "use: blip2edge export CHECKPOINT -o BUNDLE, then blip2edge eval BUNDLE",
            )
        self._model = model
        self._tokenizer = tokenizer
        self._preprocessing = preprocessing
        self._spec = prompt_spec(config)
        language = config.language
        self._prompter = Prompter(self._spec, tokenizer, language.max_positions, language.vocab_size)
        self._instructor = None
        if instructions is not None:
            self._instructor = Instructor(instructions, config.instruction_positions, config.frames)
        self._stops = FAMILIES[config.family].stop
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens

    @classmethod
    def load(cls, directory: Path, model: CaptionerModel, options: JudgeOptions) -> CheckpointAnswerer:
        """Reads what belongs to a model.

        Raises:
            CheckpointError: Something is missing or does not fit.
            UsageError: An option that is for bundles.
        """
        others = sorted(options.generation.keys() - {"max_new_tokens"})
        if others:
            raise UsageError(
                f"a checkpoint is decoded greedily, and {option(others[0])} is for bundles",
                "export it first: blip2edge export CHECKPOINT -o BUNDLE",
            )
        instructions = None
        if model.config.instruction_positions:
            instructions = Tokenizer.from_file(directory / "qformer_tokenizer" / TOKENIZER_FILE)
        return cls(
            model,
            Tokenizer.from_file(directory / TOKENIZER_FILE),
            read_preprocessing(directory),
            instructions,
            batch_size=options.batch_size,
            max_new_tokens=options.generation.get("max_new_tokens", MAX_NEW_TOKENS),
        )

    def question(self, text: str) -> str:
        """The prompt that asks a question."""
        return self._prompter.question(text)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Texts | None = None) -> list[str]:
        """A text a picture; rows whose prompts are of one length go together."""
        given = [self._prompter.filled(text) for text in prompts or [None] * len(pictures)]
        made = [self._prompter(text) for text in given]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(made):
            groups.setdefault(tuple(map(len, prompt.runs)), []).append(row)
        texts = [""] * len(pictures)
        for group in groups.values():
            for start in range(0, len(group), self._batch_size):
                rows = group[start : start + self._batch_size]
                visual_tokens = self._look([pictures[row] for row in rows], [given[row] for row in rows])
                ids = self._written(visual_tokens, [made[row] for row in rows])
                for row, written in zip(rows, ids, strict=True):
                    texts[row] = self._text(written)
        return texts

    def _look(self, pictures: list[Image.Image], prompts: list[str | None]) -> Tensor:
        """float32 [B, Q, D]."""
        pixels = torch.from_numpy(self._preprocessing.batch(pictures))
        instruction = self._instructor(prompts).values() if self._instructor is not None else ()
        return self._model.visual_tokens(pixels, *(torch.from_numpy(array) for array in instruction))

    def _written(self, visual_tokens: Tensor, prompts: list[Prompt]) -> list[list[int]]:
        """The ids that follow, greedily, up to the end token."""
        ends = torch.tensor(self._model.config.eos_token_ids)
        step = self._step(visual_tokens, prompts)
        rows = torch.zeros((len(prompts), 0), dtype=torch.int64)
        finished = torch.zeros(len(prompts), dtype=torch.bool)
        for _ in range(self._max_new_tokens):
            token_ids = step(rows).argmax(dim=-1)  # [B]
            rows = torch.cat([rows, token_ids[:, None]], dim=1)
            finished |= torch.isin(token_ids, ends)
            if bool(finished.all()):
                break
        last = set(ends.tolist())
        return [list(takewhile(lambda token: token not in last, row)) for row in rows.tolist()]

    def _step(self, visual_tokens: Tensor, prompts: list[Prompt]) -> Step:
        """What gives the logits of the next token, for the way in which this language model sees a picture."""
        language = self._language
        before, behind = (
            torch.tensor([prompt.runs[side] for prompt in prompts], dtype=torch.int64).view(len(prompts), -1)
            for side in (0, -1)
        )
        if language.config.is_encoder_decoder:
            states = self._around(visual_tokens, before, behind)
            return self._decoder_step(states, torch.ones(states.shape[:2], dtype=torch.int64))
        if language.config.cross is not None:
            looks = [prompt.looks for prompt in prompts]
            return self._cross_step(visual_tokens, behind, (torch.tensor(looks) >= 0).long())
        start = self._around(visual_tokens, before, behind)
        return lambda written: self._logits(torch.cat([start, language.embed(written)], dim=1))

    def _around(self, visual_tokens: Tensor, before: Tensor, behind: Tensor) -> Tensor:
        """The visual tokens in their place: [B, S, D]."""
        text = self._language.embed(behind)
        return torch.cat([self._language.embed(before), visual_tokens.to(text.dtype), text], dim=1)

    def _logits(self, embeds: Tensor, **cross: Any) -> Tensor:
        """[B, V] behind the last slot."""
        rows, slots = embeds.shape[:2]
        positions = torch.arange(slots).expand(rows, -1)
        mask = torch.ones(rows, slots, dtype=torch.int64)
        logits, _ = self._language(embeds, mask, positions, positions[:, -1:], **cross)
        last: Tensor = logits[:, 0]
        return last

    def _decoder_step(self, embeds: Tensor, mask: Tensor) -> Step:
        """An encoder reads visual tokens and prompt once; the text begins with a start token."""
        language = self._language
        cross = language.cross_key_values(language.encode(embeds, mask))
        start = torch.full((len(embeds), 1), self._model.config.decoder_start_token_id or 0)
        return lambda written: self._logits(
            language.embed(torch.cat([start, written], dim=1)), cross=cross, cross_attention_mask=mask
        )

    def _cross_step(self, visual_tokens: Tensor, ids: Tensor, looks: Tensor) -> Step:
        """A decoder that looks at the picture from between its layers.

        Args:
            visual_tokens: [B, Q, D].
            ids: int64 [B, S], the prompt.
            looks: int64 [B, S], 1 where a token looks at the picture; [B, 0] for a model whose tokens all do. What
                is written looks as the prompt's end does.
        """
        language = self._language
        cross = language.cross_key_values(visual_tokens)
        rows, slots = visual_tokens.shape[:2]

        def logits(written: Tensor) -> Tensor:
            seen = torch.ones(rows, slots, dtype=torch.int64)
            if looks.shape[1]:
                every = torch.cat([looks, looks[:, -1:].expand(-1, written.shape[1])], dim=1)
                seen = every[:, :, None].expand(-1, -1, slots)
            embeds = language.embed(torch.cat([ids, written], dim=1))
            return self._logits(embeds, cross=cross, cross_attention_mask=seen)

        return logits

    def _text(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids)
        for stop in self._stops:
            text = text.partition(stop)[0]
        return text.strip()


class CheckpointComparer:
    """A model that compares, in torch.

    Args:
        model: In eval mode.
        tokenizer: Of its text side.
        preprocessing: As its picture encoder was trained.
        batch_size: Pictures, or pairs, at once.
    """

    def __init__(
        self, model: RetrievalModel, tokenizer: Tokenizer, preprocessing: Preprocessing, batch_size: int
    ) -> None:
        self._model = model
        self._matcher: Any = model.matcher
        self._tokenizer = tokenizer
        self._preprocessing = preprocessing
        self._batch_size = batch_size

    @property
    def has_head(self) -> bool:
        """Whether it has a matching head."""
        return self._model.config.has_match

    @torch.inference_mode()
    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        """Vectors of pictures."""
        parts = [
            self._matcher.image_features(self._look(pictures[at : at + self._batch_size]))
            for at in range(0, len(pictures), self._batch_size)
        ]
        vectors: Vectors = torch.cat(parts).numpy()
        return vectors[:, 0] if vectors.shape[1] == 1 else vectors

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts."""
        parts = [
            self._matcher.text_embeds(*self._padded(texts[at : at + self._batch_size]))
            for at in range(0, len(texts), self._batch_size)
        ]
        vectors: Vectors = torch.cat(parts).numpy()
        return vectors

    @torch.inference_mode()
    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """What the matching head says."""
        found: list[list[float]] = [[] for _ in pictures]
        pairs = [(row, text) for row, own in enumerate(texts) for text in own]
        embeds = self._look(pictures)
        for at in range(0, len(pairs), self._batch_size):
            part = pairs[at : at + self._batch_size]
            ids, mask = self._padded([text for _, text in part])
            logits = self._matcher.match(embeds[[row for row, _ in part]], ids, mask)
            for (row, _), value in zip(part, logits.softmax(dim=-1)[:, 1].tolist(), strict=True):
                found[row].append(value)
        return found

    def _look(self, pictures: Sequence[Image.Image]) -> Tensor:
        embeds: Tensor = self._model.vision(torch.from_numpy(self._preprocessing.batch(pictures)))
        return embeds

    def _padded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask int64 [B, S], padded on the right; what is too long for the model is cut before its end."""
        longest = self._model.config.max_positions
        rows = [self._tokenizer.encode(text) for text in texts]
        rows = [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]
        return pad_rows(rows, 0), pad_rows([[1] * len(row) for row in rows], 0)


def open_checkpoint(directory: Path, options: JudgeOptions) -> Judge:
    """Loads a checkpoint for what it does.

    Args:
        directory: Config, weights, tokenizer and preprocessing.
        options: How it is run; the backend is torch on the CPU.

    Raises:
        CheckpointError: Something is missing or does not fit.
        UsageError: An option that is for bundles, or a family that is scored as a bundle.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(directory)
    if isinstance(model, CaptionerModel):
        return Judge(answerer=CheckpointAnswerer.load(directory, model, options))
    tokenizer = Tokenizer.from_file(directory / TOKENIZER_FILE)
    preprocessing = read_preprocessing(directory)
    return Judge(comparer=CheckpointComparer(model, tokenizer, preprocessing, options.batch_size))


def read_preprocessing(directory: Path) -> Preprocessing:
    """How a checkpoint's pictures are prepared.

    Raises:
        CheckpointError: It does not say.
    """
    for name in PROCESSORS:
        if (directory / name).is_file():
            return Preprocessing.from_hf(read_json(directory / name))
    raise CheckpointError(f"{directory} has no {PROCESSORS[0]}", "save the processor beside the model")
