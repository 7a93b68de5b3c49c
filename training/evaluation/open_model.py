"""Opens a bundle or a checkpoint for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.hub.download import find_bundle
from blip2edge.bundle.manifest import MANIFEST, read_manifest
from blip2edge.errors import BundleError, UsageError, option
from blip2edge.runtime.backends.base import check_threads
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.decoding.sampling import warn_of_unused
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import PromptBuilder
from blip2edge.training.evaluation.models import (
    CaptionModel,
    EvaluatedModel,
    MatchModel,
    ModelOptions,
    Prompts,
    Vectors,
    unsigned_checkpoint,
)


class BundleCaptioner:
    """A captioner from a bundle, run by this project's runtime."""

    def __init__(self, captioner: Captioner, options: ModelOptions) -> None:
        # Raises for wrong options before any picture is read.
        warn_of_unused(captioner.options(**options.generation), options.generation)
        self._captioner = captioner
        self._options = options

    def __call__(self, pictures: Sequence[ItemSource], prompts: Prompts | None = None) -> list[str]:
        """Generates one text for each picture."""
        results = self._captioner.caption_many(
            list(pictures), prompts=prompts, batch_size=self._options.batch_size, **self._options.generation
        )
        return [result.text for result in results]

    @property
    def prompts(self) -> PromptBuilder:
        """Returns the prompt builder of the bundle."""
        return self._captioner.prompts

    def question(self, text: str) -> str:
        """Returns the prompt for a question."""
        return self.prompts.question(text)


class BundleMatcher:
    """A matcher from a bundle, run by this project's runtime."""

    def __init__(self, matcher: Matcher, options: ModelOptions) -> None:
        self._matcher = matcher
        self._batch_size = options.batch_size

    @property
    def has_head(self) -> bool:
        """Returns whether the model has a matching head."""
        return self._matcher.head is not None

    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        """Computes unit vectors of pictures: float32 [N, F], or [N, K, F] if a picture has K vectors."""
        return self._matcher.embed_images(list(pictures), batch_size=self._batch_size)

    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        """Computes unit vectors of texts: float32 [M, F]."""
        return self._matcher.embed_texts(texts, batch_size=self._batch_size, cut=True)

    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]], *, logits: bool = False
    ) -> list[list[float]]:
        """Computes the match probability of each picture with each of its own texts, by the matching head.

        If `logits` is True, the head's logits of "match" are returned instead.
        """
        return self._matcher.probabilities(list(pictures), texts, batch_size=self._batch_size, logits=logits)


def open_model(model: Path, options: ModelOptions) -> EvaluatedModel:
    """Opens a model for evaluation.

    Args:
        model: A bundle, also by its name on the hub, or a checkpoint directory.
        options: How the model is run.

    Raises:
        BundleError: The directory is neither a bundle nor a checkpoint.
        BackendError: The backend is not available.
        CheckpointError: The checkpoint cannot be read.
        UsageError: The model does not support an option.
    """
    model = find_bundle(model, public_key=options.require_signature)
    if (model / MANIFEST).is_file():
        check_threads(options.threads)
        bundle = Bundle.open(model, require_signature=options.require_signature)
        if bundle.manifest.prompt is None:
            matcher = Matcher(bundle, options.backend, options.threads)
            return EvaluatedModel(matcher=BundleMatcher(matcher, options))
        captioner = Captioner(bundle, options.backend, options.threads)
        return EvaluatedModel(captioner=BundleCaptioner(captioner, options))
    if (model / "config.json").is_file():
        if options.require_signature is not None:
            raise unsigned_checkpoint(model)
        # Imported here: it needs torch, which a machine that only runs bundles does not have.
        from blip2edge.training.evaluation.checkpoints.models import open_checkpoint_model

        return open_checkpoint_model(model, options)
    if not model.is_dir():
        raise BundleError(
            f"{model} is not a directory" if model.exists() else f"there is no directory {model}",
            "give a bundle, hub:ORG/NAME, or a checkpoint directory",
        )
    raise BundleError(
        f"{model} is neither a bundle (no {MANIFEST}) nor a checkpoint (no config.json)",
        "make a bundle: blip2edge export CHECKPOINT -o BUNDLE",
    )


def open_captioner(model: Path, options: ModelOptions) -> CaptionModel:
    """Opens a bundle or a checkpoint that must be a captioner; arguments and other errors are those of `open_model`.

    Raises:
        UsageError: The model is not a captioner.
    """
    captioner = open_model(model, options).captioner
    if captioner is None:
        raise UsageError(
            f"expected {option('captioner')} to be a captioner, but {model} compares pictures with texts and cannot "
            "caption them",
            "give a captioner, such as BLIP-2",
        )
    return captioner


def open_matcher(model: Path, options: ModelOptions) -> MatchModel:
    """Opens a bundle or a checkpoint that must have a matching head.

    Arguments and other errors are those of `open_model`.

    Raises:
        UsageError: The model has no matching head.
    """
    matcher = open_model(model, options).matcher
    if matcher is None or not matcher.has_head:
        found = "is a captioner:" if matcher is None else "compares vectors only:"
        raise UsageError(
            f"expected {option('matcher')} to have a matching head (ITM), but {model} {found} it has no matching head",
            "give the output of stage 1, or a checkpoint of BLIP or BLIP-2 for image-text matching",
        )
    return matcher


def check_prompt(captioner: CaptionModel, model: Path, prompt: str | None) -> None:
    """Checks that a captioner can caption pictures with a prompt, or without one.

    Raises:
        UsageError: The model answers questions, and there is no prompt.
    """
    builder = getattr(captioner, "prompts", None)
    if isinstance(builder, PromptBuilder) and builder.spec.required and prompt is None:
        raise UsageError(
            f"expected a model that captions pictures without a question, but {model} answers questions on pictures",
            f"give a captioner, data with questions, or a question for all pictures with {option('prompt')}",
        )


def open_clip(model: Path, options: ModelOptions) -> MatchModel:
    """Opens the model of the option ``clip``, which compares pictures with captions.

    A bundle of a captioner is refused by its ``bundle.json``, before its graphs are loaded.

    Raises:
        UsageError: The model is a captioner. Other errors are those of `open_model`.
    """
    model = find_bundle(model, public_key=options.require_signature)
    is_bundle = (model / MANIFEST).is_file()
    matcher = None
    if not is_bundle or read_manifest(model).prompt is None:
        matcher = open_model(model, options).matcher
    if matcher is None:
        raise UsageError(
            f"expected {option('clip')} to be a model that compares pictures with texts, but {model} is a captioner",
            "give a bundle or checkpoint of CLIP, or of BLIP or BLIP-2 for image-text matching (ITM)",
        )
    return matcher
