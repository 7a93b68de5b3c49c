"""Runs checkpoints in torch for evaluation, as the reference for bundles: greedy decoding, without a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip2edge.errors import UsageError, option
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import load_model
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.checkpoint.tokenizer import read_tokenizer
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.registry import FAMILIES
from blip2edge.model.language.bert import BertDecoder
from blip2edge.model.retrieval import RetrievalModel
from blip2edge.runtime.decoding.options import check_integer
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.text.prompt import InstructionTokenizer, Prompt
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.evaluation.models import EvaluatedModel, ModelOptions, Prompts, Vectors
from blip2edge.training.loading.batches import pad_with_mask
from blip2edge.training.loading.caption_texts import captioner_prompts

Step = Callable[[Tensor], Tensor]
"""Maps the generated ids [B, N] to the logits of the next token [B, V]."""

_MAX_NEW_TOKENS = 30  # the default of an exported bundle


class CheckpointCaptioner:
    """A captioner from a checkpoint, run in torch.

    Args:
        model: The model in eval mode.
        tokenizer: Tokenizer of the language model.
        preprocessing: Preprocessing of the pictures.
        instructions: Tokenizer of the Q-Former, if the Q-Former reads the prompt.
        batch_size: Number of pictures in one batch.
        max_new_tokens: Longest text in tokens, the end token included.
        queries: Number of visual tokens of each picture, of an elastic checkpoint; None for all.

    Raises:
        UsageError: The model takes videos, or its text encoder attends to the picture (BLIP for VQA); or it was not
            trained with this number of queries.
    """

    def __init__(
        self,
        model: CaptionerModel,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        instructions: Tokenizer | None = None,
        *,
        batch_size: int = 16,
        max_new_tokens: int = _MAX_NEW_TOKENS,
        queries: int | None = None,
    ) -> None:
        config = model.config
        _check_queries(config, queries)
        self._queries = queries
        self._language: Any = model.language
        encoder_attends = isinstance(model.language, BertDecoder) and config.language.is_encoder_decoder
        if config.frames > 1 or encoder_attends:
            raise UsageError(
                f"a checkpoint of the family {config.family} can be scored only as a bundle",
                "export the checkpoint, and score the bundle",
            )
        self._model = model
        self._tokenizer = tokenizer
        self._preprocessing = preprocessing
        self._prompts = captioner_prompts(config, tokenizer)
        self._instructions = None
        if instructions is not None:
            self._instructions = InstructionTokenizer(instructions, config.instruction_positions, config.frames)
        self._stops = FAMILIES[config.family].stop
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens

    @classmethod
    def load(cls, directory: Path, model: CaptionerModel, options: ModelOptions) -> CheckpointCaptioner:
        """Loads the tokenizers and the preprocessing of a model.

        Raises:
            CheckpointError: A file is missing or does not fit the model.
            UsageError: An option is set that only bundles support.
        """
        others = sorted(options.generation.keys() - {"max_new_tokens", "queries"})
        if others:
            raise UsageError(
                f"a checkpoint is decoded greedily; {option(others[0])} works with bundles only",
                "export the checkpoint, and score the bundle",
            )
        instructions = None
        if model.config.instruction_positions:
            instructions = read_tokenizer(directory / "qformer_tokenizer").open()
        return cls(
            model,
            read_tokenizer(directory).open(),
            load_preprocessing(directory).preprocessing,
            instructions,
            batch_size=options.batch_size,
            max_new_tokens=options.generation.get("max_new_tokens", _MAX_NEW_TOKENS),
            queries=options.generation.get("queries"),
        )

    @property
    def _device(self) -> torch.device:
        """The device that the model is on now."""
        return self._vision_weight.device

    @property
    def _vision_weight(self) -> Tensor:
        """A weight of the picture encoder, whose device and dtype the pixel values need."""
        return next(self._model.vision.parameters())

    def question(self, text: str) -> str:
        """Makes the prompt that asks a question."""
        return self._prompts.question(text)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Prompts | None = None) -> list[str]:
        """Generates one text for each picture. Rows with prompts of equal length form a batch."""
        given = [self._prompts.with_default(text) for text in prompts or [None] * len(pictures)]
        prepared = [self._prompts(text, queries=self._queries) for text in given]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prepared):
            groups.setdefault(tuple(map(len, prompt.segments)), []).append(row)
        texts = [""] * len(pictures)
        for group in groups.values():
            for start in range(0, len(group), self._batch_size):
                rows = group[start : start + self._batch_size]
                visual_tokens = self._visual_tokens([pictures[row] for row in rows], [given[row] for row in rows])
                ids = self._generate(visual_tokens, [prepared[row] for row in rows])
                for row, written in zip(rows, ids, strict=True):
                    texts[row] = self._text(written)
        return texts

    def _visual_tokens(self, pictures: list[Image.Image], prompts: list[str | None]) -> Tensor:
        """Encodes pictures: float32 [B, Q, D]."""
        pixels = torch.from_numpy(self._preprocessing.batch(pictures)).to(self._vision_weight)
        instruction = self._instructions(prompts).values() if self._instructions is not None else ()
        given = [torch.from_numpy(array).to(self._device) for array in instruction]
        embeds = self._model.vision(pixels)
        bridge = next(self._model.bridge.parameters(), embeds)  # BLIP's bridge has no weights
        chosen = {} if self._queries is None else {"query_ids": torch.arange(self._queries, device=self._device)[None]}
        tokens: Tensor = self._model.bridge(embeds.to(bridge.dtype), *given, **chosen)
        return tokens

    def _generate(self, visual_tokens: Tensor, prompts: list[Prompt]) -> list[list[int]]:
        """Generates token ids greedily, up to the end token."""
        with self._device:  # where new tensors are made
            return self._generate_here(visual_tokens, prompts)

    def _generate_here(self, visual_tokens: Tensor, prompts: list[Prompt]) -> list[list[int]]:
        """:meth:`_generate`, with the model's device as the default one."""
        ends = torch.tensor(self._model.config.ends)
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
        """The function that computes the logits of the next token, by the kind of language model."""
        language = self._language
        before, after = (
            torch.tensor([prompt.segments[side] for prompt in prompts], dtype=torch.int64).view(len(prompts), -1)
            for side in (0, -1)
        )
        if language.config.is_encoder_decoder:
            states = self._around(visual_tokens, before, after)
            return self._decoder_step(states, torch.ones(states.shape[:2], dtype=torch.int64))
        if language.config.cross is not None:
            pictures = torch.tensor([prompt.attends_to for prompt in prompts])
            return self._cross_step(visual_tokens, after, (pictures >= 0).long())
        start = self._around(visual_tokens, before, after)
        return lambda written: self._logits(torch.cat([start, language.embed(written)], dim=1))

    def _around(self, visual_tokens: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Embeddings of the prompt with the visual tokens at the picture's place: [B, S, D]."""
        text = self._language.embed(after)
        return torch.cat([self._language.embed(before), visual_tokens.to(text.dtype), text], dim=1)

    def _logits(self, embeds: Tensor, **cross: Any) -> Tensor:
        """Logits [B, V] after the last position."""
        rows, length = embeds.shape[:2]
        positions = torch.arange(length).expand(rows, -1)
        mask = torch.ones(rows, length, dtype=torch.int64)
        logits, _ = self._language(embeds, mask, positions, positions[:, -1:], **cross)
        last: Tensor = logits[:, 0]
        return last

    def _decoder_step(self, embeds: Tensor, mask: Tensor) -> Step:
        """For an encoder-decoder model: encodes visual tokens and prompt once; the text begins with a start token."""
        language = self._language
        cross = language.cross_key_values(language.encode(embeds, mask))
        start = torch.full((len(embeds), 1), self._model.config.decoder_start_token_id or 0)
        return lambda written: self._logits(
            language.embed(torch.cat([start, written], dim=1)), cross=cross, cross_attention_mask=mask
        )

    def _cross_step(self, visual_tokens: Tensor, ids: Tensor, picture_mask: Tensor) -> Step:
        """For a decoder with cross-attention to the visual tokens.

        Args:
            visual_tokens: [B, Q, D].
            ids: int64 [B, S], the prompt.
            picture_mask: int64 [B, S], 1 where a token attends to the picture; [B, 0] if all tokens do. Generated
                tokens use the value of the last prompt token.
        """
        language = self._language
        cross = language.cross_key_values(visual_tokens)
        rows, count = visual_tokens.shape[:2]

        def logits(written: Tensor) -> Tensor:
            mask = torch.ones(rows, count, dtype=torch.int64)
            if picture_mask.shape[1]:
                generated = picture_mask[:, -1:].expand(-1, written.shape[1])
                mask = torch.cat([picture_mask, generated], dim=1)[:, :, None].expand(-1, -1, count)
            embeds = language.embed(torch.cat([ids, written], dim=1))
            return self._logits(embeds, cross=cross, cross_attention_mask=mask)

        return logits

    def _text(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids)
        for stop in self._stops:
            text = text.partition(stop)[0]
        return text.strip()


def _check_queries(config: CaptionerConfig, queries: int | None) -> None:
    """Raises UsageError if a checkpoint was not trained with this number of queries."""
    if queries is None:
        return
    if not config.elastic:
        raise UsageError(
            f"this checkpoint does not take {option('queries')}: its bridge was trained with all of its queries only",
            f"leave {option('queries')} out, or train it with [stage2] elastic = true",
        )
    check_integer("queries", queries, config.elastic, config.bridge.num_visual_tokens)


class CheckpointMatcher:
    """A matcher from a checkpoint, run in torch.

    Args:
        model: The model in eval mode.
        tokenizer: Tokenizer of the text encoder.
        preprocessing: Preprocessing of the pictures.
        batch_size: Number of pictures, or of pairs of a picture and a text, in one batch.
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
        """Whether the model has a matching head."""
        return self._model.config.has_match

    @torch.inference_mode()
    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        """Computes the vectors of pictures; see :class:`MatchModel`."""
        parts = [
            self._matcher.image_features(self._image_embeds(pictures[at : at + self._batch_size]))
            for at in range(0, len(pictures), self._batch_size)
        ]
        vectors: Vectors = torch.cat(parts).numpy()
        return vectors[:, 0] if vectors.shape[1] == 1 else vectors

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        """Computes the vectors of texts; see :class:`MatchModel`."""
        parts = [
            self._matcher.text_embeds(*self._padded(texts[at : at + self._batch_size]))
            for at in range(0, len(texts), self._batch_size)
        ]
        vectors: Vectors = torch.cat(parts).numpy()
        return vectors

    @torch.inference_mode()
    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]], *, logits: bool = False
    ) -> list[list[float]]:
        """Computes the probabilities or logits of the matching head; see :class:`MatchModel`."""
        found: list[list[float]] = [[] for _ in pictures]
        pairs = [(row, text) for row, own in enumerate(texts) for text in own]
        embeds = self._image_embeds(pictures)
        for at in range(0, len(pairs), self._batch_size):
            part = pairs[at : at + self._batch_size]
            ids, mask = self._padded([text for _, text in part])
            scores: Tensor = self._matcher.match(embeds[[row for row, _ in part]], ids, mask)  # [n, 2]
            if not logits:
                scores = scores.softmax(dim=-1)
            for (row, _), value in zip(part, scores[:, 1].tolist(), strict=True):
                found[row].append(value)
        return found

    def _image_embeds(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Encodes pictures: float32 [B, P, Dv]."""
        embeds: Tensor = self._model.vision(torch.from_numpy(self._preprocessing.batch(pictures)))
        return embeds

    def _padded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask int64 [B, S], padded on the right. Too long texts are cut, and keep their last token."""
        longest = self._model.config.max_positions
        rows = [self._tokenizer.encode(text) for text in texts]
        rows = [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]
        return pad_with_mask(rows, 0)


def open_checkpoint_model(directory: Path, options: ModelOptions) -> EvaluatedModel:
    """Opens a checkpoint for evaluation, in torch on the CPU.

    Args:
        directory: Directory with config, weights, tokenizer and preprocessing.
        options: How the model is run; the backend is ignored.

    Raises:
        CheckpointError: A file is missing or does not fit the model.
        UsageError: An option is set that only bundles support, or the family can be scored only as a bundle.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(directory)
    if isinstance(model, CaptionerModel):
        return EvaluatedModel(captioner=CheckpointCaptioner.load(directory, model, options))
    tokenizer = read_tokenizer(directory).open()
    preprocessing = load_preprocessing(directory).preprocessing
    return EvaluatedModel(matcher=CheckpointMatcher(model, tokenizer, preprocessing, options.batch_size))
