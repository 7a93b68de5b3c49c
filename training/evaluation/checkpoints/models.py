"""Runs checkpoints in torch for evaluation and validation, as the reference for bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip2edge.errors import UsageError, option
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import load_model
from blip2edge.model.checkpoint.generation import MAX_NEW_TOKENS, read_generation
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.checkpoint.tokenizer import read_tokenizer
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.registry import FAMILIES
from blip2edge.model.retrieval import RetrievalModel
from blip2edge.runtime.captioning.encoder import StageClock, TextParts
from blip2edge.runtime.captioning.pipeline import TextGenerator
from blip2edge.runtime.decoding.confidence import Confidence
from blip2edge.runtime.decoding.draft_model import DraftSelector
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.logits_processors import check_ids, check_prompt_ids
from blip2edge.runtime.decoding.options import GenerationOptions, check_integer, merged
from blip2edge.runtime.decoding.sampling import warn_of_unused
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import InstructionTokenizer
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.evaluation.checkpoints.decoding import TorchLanguage
from blip2edge.training.evaluation.checkpoints.encoding import TorchEncoder
from blip2edge.training.evaluation.models import EvaluatedModel, ModelOptions, Prompts, Vectors
from blip2edge.training.loading.batches import pad_with_mask
from blip2edge.training.loading.caption_texts import captioner_prompts


class CheckpointCaptioner:
    """A captioner from a checkpoint, run in torch on the device of its weights.

    Texts are decoded by the runtime's own code, with a KV cache: greedily, with beams or by sampling.

    Args:
        model: The model in eval mode; its weights may change between two calls.
        tokenizer: Tokenizer of the language model.
        preprocessing: Preprocessing of the pictures.
        instructions: Tokenizer of the Q-Former, if the prompt is also an input of the Q-Former (InstructBLIP).
        batch_size: Number of pictures in one batch.
        defaults: Default options, as the checkpoint's bundle would have; None for greedy decoding that ends at the
            family's end token.
        generation: Fields of `GenerationOptions`, which replace the defaults.
        agree: Function that returns the logits of the first process in all processes, if they decode together.

    Attributes:
        prompts: The prompt builder of the model's family.

    Raises:
        UsageError: An option is out of range, needs a bundle, or does not fit the model.
    """

    def __init__(
        self,
        model: CaptionerModel,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        instructions: Tokenizer | None = None,
        *,
        batch_size: int = 16,
        defaults: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        config = model.config
        if defaults is None:
            defaults = {
                "eos_token_ids": config.ends,
                "stop": FAMILIES[config.family].stop,
                "max_new_tokens": MAX_NEW_TOKENS,
            }
        self._options = _checked(merged(defaults, generation or {}), config)
        reader = None
        if instructions is not None:
            reader = InstructionTokenizer(instructions, config.instruction_positions, config.frames)
        self.prompts = captioner_prompts(config, tokenizer)
        self._encoder = TorchEncoder(model, preprocessing, TextParts(tokenizer, self.prompts, reader))
        self._generator = TextGenerator(
            TorchLanguage(model.language, config.language, config.decoder_start_token_id, agree),
            tokenizer,
            config.language.max_positions,
            DraftSelector(default="none"),
            Confidence(None),
        )
        check_ids(self._options, config.language.vocab_size)
        check_prompt_ids(self._options, given=self.prompts.spec.gives_ids)
        self._batch_size = batch_size

    @classmethod
    def load(cls, directory: Path, model: CaptionerModel, options: ModelOptions) -> CheckpointCaptioner:
        """Loads the tokenizers, the preprocessing and the generation defaults of a model.

        Raises:
            CheckpointError: A file is missing or does not fit the model.
            UsageError: An option is out of range, needs a bundle, or does not fit the model.
        """
        instructions = None
        if model.config.instruction_positions:
            instructions = read_tokenizer(directory / "qformer_tokenizer").open()
        captioner = cls(
            model,
            read_tokenizer(directory).open(),
            load_preprocessing(directory).preprocessing,
            instructions,
            batch_size=options.batch_size,
            defaults=read_generation(directory, model.config)[0],
            generation=options.generation,
        )
        warn_of_unused(captioner._options, options.generation)
        return captioner

    def question(self, text: str) -> str:
        """Returns the prompt for a question, in the template of the family."""
        return self.prompts.question(text)

    def __call__(self, pictures: Sequence[ItemSource], prompts: Prompts | None = None) -> list[str]:
        """Generates one text for each picture; prompts of different lengths share a batch."""
        return [self._generator.text(one, self._options) for one in self.generate(pictures, prompts)]

    @torch.inference_mode()
    def generate(self, pictures: Sequence[ItemSource], prompts: Prompts | None = None) -> list[Generated]:
        """Generates one text for each picture, in order.

        Args:
            pictures: One item for each text: a picture, or several pictures (Flamingo, videos).
            prompts: One prompt, or None, for each picture; None for no prompts.

        Returns:
            Token ids, finish reason and log-probabilities of each text.
        """
        given = list(prompts or [None] * len(pictures))
        clock = StageClock()
        texts: list[Generated] = []
        for start in range(0, len(pictures), self._batch_size):
            rows = range(start, min(start + self._batch_size, len(pictures)))
            batch = self._encoder(
                [pictures[row] for row in rows], [given[row] for row in rows], clock, self._options.queries
            )
            texts += self._generator.complete(batch, self._options, rows, clock)
        return texts


def _checked(values: dict[str, Any], config: CaptionerConfig) -> GenerationOptions:
    """Returns the generation options of a checkpoint, after checking their values.

    Raises:
        UsageError: An option is out of range, or works only with a bundle.
    """
    options = GenerationOptions(**values)
    if options.abstain_below is not None:
        raise UsageError(
            f"{option('abstain_below')} needs a confidence, which a checkpoint does not have",
            "export the checkpoint, and fit the bundle's confidence: docs/confidence.md",
        )
    if options.draft not in ("auto", "none"):
        raise UsageError(
            f"a checkpoint is decoded without a draft model, and {option('draft')} is {options.draft!r}",
            f"leave {option('draft')} out, or export the checkpoint and use the bundle",
        )
    _check_queries(config, options.queries)
    return options


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
        """Returns whether the model has a matching head."""
        return self._model.config.has_match

    @property
    def _device(self) -> torch.device:
        """Returns the device of the weights."""
        return next(self._model.parameters()).device

    @torch.inference_mode()
    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        """Computes unit vectors of pictures: float32 [N, F], or [N, K, F] if a picture has K vectors."""
        parts = [
            self._matcher.image_features(self._image_embeds(pictures[at : at + self._batch_size]))
            for at in range(0, len(pictures), self._batch_size)
        ]
        vectors: Vectors = torch.cat(parts).cpu().numpy()
        return vectors[:, 0] if vectors.shape[1] == 1 else vectors

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        """Computes unit vectors of texts: float32 [M, F]."""
        parts = [
            self._matcher.text_embeds(*self._padded(texts[at : at + self._batch_size]))
            for at in range(0, len(texts), self._batch_size)
        ]
        vectors: Vectors = torch.cat(parts).cpu().numpy()
        return vectors

    @torch.inference_mode()
    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]], *, logits: bool = False
    ) -> list[list[float]]:
        """Computes the match probability of each picture with each of its own texts, by the matching head.

        If `logits` is True, the head's logits of "match" are returned instead.
        """
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
        """Runs the picture encoder on pictures; returns float32 [B, P, Dv]."""
        pixels = torch.from_numpy(self._preprocessing.batch(pictures)).to(self._device)
        embeds: Tensor = self._model.vision(pixels)
        return embeds

    def _padded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenizes texts; returns ids and mask, int64 [B, S], padded on the right.

        Texts that are too long are cut, but keep their last token.
        """
        longest = self._model.config.max_positions
        rows = [self._tokenizer.encode(text) for text in texts]
        rows = [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]
        ids, mask = pad_with_mask(rows, 0)
        return ids.to(self._device), mask.to(self._device)


def open_checkpoint_model(directory: Path, options: ModelOptions) -> EvaluatedModel:
    """Opens a checkpoint for evaluation, in torch on the GPU, or on the CPU if torch has none.

    Args:
        directory: Directory with config, weights, tokenizer and preprocessing.
        options: How the model is run. The backend ``auto``, ``cpu`` or ``cuda`` chooses the device.

    Raises:
        CheckpointError: A file is missing or does not fit the model.
        UsageError: An option is set that only bundles support, or torch has no GPU and the backend is ``cuda``.
    """
    device = device_for(options.backend)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(directory).to(device)
    if isinstance(model, CaptionerModel):
        return EvaluatedModel(captioner=CheckpointCaptioner.load(directory, model, options))
    tokenizer = read_tokenizer(directory).open()
    preprocessing = load_preprocessing(directory).preprocessing
    return EvaluatedModel(matcher=CheckpointMatcher(model, tokenizer, preprocessing, options.batch_size))


def device_for(backend: str) -> str:
    """Returns the torch device for a checkpoint, from the name of a backend."""
    if backend not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"expected {option('backend')} auto, cpu or cuda for a checkpoint, which runs in torch, got {backend}",
            "export the checkpoint, and score the bundle",
        )
    if backend == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"{option('backend')} is cuda, but torch {torch.__version__} finds no GPU",
            f"leave {option('backend')} out, or install torch for this GPU: https://pytorch.org",
        )
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"
