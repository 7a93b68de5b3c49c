"""The matcher: image-text matching (ITM), cosine similarity (ITC, CLIP), and the vectors of pictures and texts.

    picture --preprocess--> pixel_values --vision--> image_embeds --image_features--> K vectors of norm 1
    text    --tokenize---> input_ids    -----------------------------text_embeds--> one vector of norm 1
    image_embeds, input_ids ------------------------------------------------match--> probability

The cosine of a picture and a text is the largest dot product of the text's vector with the picture's K vectors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.bundle import Bundle, load_whole
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.prompt_spec import MARKERS
from blip2edge.bundle.schema import (
    BRIDGE,
    DECODER,
    IMAGE_FEATURES,
    MATCH,
    TEXT_EMBEDS,
    TOKENIZER_FILE,
    VISION,
    BackendName,
)
from blip2edge.errors import Blip2EdgeError, BundleError, PromptError, UsageError, option
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.runtime.backends.base import check_threads
from blip2edge.runtime.captioning.assemble import LoadedBundle, image_parts
from blip2edge.runtime.captioning.request import MatchResult, check_text, in_batches, listed, raising, starts
from blip2edge.runtime.decoding.options import check_integer
from blip2edge.runtime.images.preprocess import ImageSource
from blip2edge.runtime.images.video import Channels, in_rgb
from blip2edge.runtime.text.tokenizer import Tokenizer, check_characters_fit

Vectors = NDArray[np.float32]
Item = TypeVar("Item")


class Matcher(LoadedBundle):
    """Compares pictures with texts. Make one with :meth:`load`, and close it after use; a ``with`` block closes it."""

    def __init__(
        self,
        bundle: Bundle,
        backend: BackendName = "auto",
        threads: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(bundle, backend, threads)
        manifest = bundle.manifest
        if TEXT_EMBEDS not in manifest.graphs:
            required = manifest.prompt is not None and manifest.prompt.required
            raise BundleError(
                f"{bundle.path} {manifest.purpose} and cannot compare them with texts"
                if DECODER in manifest.graphs
                else f"{bundle.path} has no graph {TEXT_EMBEDS}",
                f"use {'ask' if required else 'caption'}",
            )
        with self._loading():
            self.graphs.open_ahead((VISION, BRIDGE, IMAGE_FEATURES, TEXT_EMBEDS, MATCH))
            self.images = image_parts(bundle, self.graphs, limits)
            self.tokenizer = Tokenizer.from_file(bundle.file(TOKENIZER_FILE), **manifest.tokenizer)
            self.features = self.graphs(IMAGE_FEATURES)
            self.texts = self.graphs(TEXT_EMBEDS)
            self.head = self.graphs(MATCH) if MATCH in manifest.graphs else None

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: BackendName = "auto",
        threads: int | None = None,
        require_signature: str | Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Matcher:
        """Opens a bundle and loads its graphs.

        Args:
            bundle: The directory that ``blip2edge export`` made, or ``hub:ORG/NAME[@REVISION]``; see
                :meth:`Bundle.open`.
            backend: Name of the backend that runs the graphs; ``auto`` for the default.
            threads: CPU threads that one operator uses; None for as many as there are cores.
            require_signature: A public key; the bundle must have a signature that fits it. See :meth:`Bundle.open`.
            limits: The largest picture that is decoded; of its fields, ``PICTURE_LIMITS`` are used.

        Raises:
            BundleError: As in :meth:`Bundle.open`; or the bundle's model generates texts and does not compare them.
            BackendError: The backend is not installed, or does not run here.
            UsageError: ``bundle`` is not a path, or ``threads`` is below 1.
        """
        check_threads(threads)
        return load_whole(
            bundle, lambda opened: cls(opened, backend, threads, limits), require_signature=require_signature
        )

    def match(self, image: ImageSource, text: str, *, channels: Channels = "rgb") -> MatchResult:
        """Compares a picture with a text.

        Args:
            image: A path, a Pillow picture or an array ``[H, W, 3]`` uint8.
            text: A description to compare with the picture, such as ``"a dog on a beach"``.
            channels: Order of an array's channels: ``"rgb"``, or ``"bgr"`` for frames of OpenCV.

        Returns:
            The probability that the text describes the picture (None for a model without a matching head, such as
            CLIP), and the cosine of their vectors.

        Raises:
            ImageError: The picture cannot be read.
            PromptError: The text is empty or too long.
            UsageError: An argument is of the wrong type.
        """
        return next(self.match_many([image], [text], channels=channels))

    @overload
    def match_many(
        self,
        images: Iterable[ImageSource],
        texts: Sequence[str],
        *,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: Literal[False] = False,
    ) -> Iterator[MatchResult]: ...

    @overload
    def match_many(
        self,
        images: Iterable[ImageSource],
        texts: Sequence[str],
        *,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: bool,
    ) -> Iterator[MatchResult | Blip2EdgeError]: ...

    def match_many(
        self,
        images: Iterable[ImageSource],
        texts: Sequence[str],
        *,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: bool = False,
    ) -> Iterator[MatchResult | Blip2EdgeError]:
        """Compares every picture with every text; arguments and errors are those of :meth:`match`.

        Args:
            images: N pictures.
            texts: M texts.
            batch_size: Number of pictures in one batch of the vision encoder.
            channels: As in :meth:`match`.
            return_exceptions: Whether to yield a picture's error in place of its M results; otherwise it is raised.

        Yields:
            The results of the first picture with all texts, in order; then those of the second picture.
        """
        self._check_open()
        pictures, sentences = _pictures(images, channels), listed("texts", texts)
        ids = [self.token_ids(text) for text in sentences]
        check_integer("batch_size", batch_size, 1)  # here, not when the first result is taken
        vectors = [self._embed([row])[0] for row in ids]
        results = in_batches(
            lambda batch: self._compare(batch, self._encode(batch), sentences, ids, vectors), pictures, batch_size
        )
        return results if return_exceptions else raising(results)

    def match_in_steps(
        self, images: Sequence[ImageSource], texts: Sequence[str], step: int
    ) -> Iterator[list[MatchResult]]:
        """Does the work of :meth:`match_many` in short steps, so that other threads can run graphs between two steps.

        Yields the results of a picture with up to ``step`` texts; an empty list after a step that computed vectors.
        """
        self._check_open()
        ids = [self.token_ids(text) for text in texts]
        parts = [slice(at, at + step) for at in starts(len(ids), step)]
        vectors: list[Vectors] = []
        for part in parts:
            vectors += [self._embed([row])[0] for row in ids[part]]
            yield []
        for image in images:
            encoded = self._encode([image])
            yield []
            for part in parts:
                yield self._compare([image], encoded, texts[part], ids[part], vectors[part])

    def probabilities(
        self,
        images: Sequence[ImageSource],
        texts: Sequence[Sequence[str]],
        *,
        batch_size: int = 1,
        channels: Channels = "rgb",
        logits: bool = False,
    ) -> list[list[float]]:
        """Computes the probability that a picture and a text match; each picture is compared with a list of its own.

        Args:
            images: N pictures; the vision encoder runs on all of them at once.
            texts: A list of texts for each picture, of any length.
            batch_size: Number of pairs in one batch of the matching head.
            channels: As in :meth:`match`.
            logits: True to return the logit of "match" (mean over the queries) in place of the probability.

        Returns:
            For each picture, the probabilities (or logits) of its texts.

        Raises:
            ImageError, PromptError: As in :meth:`match`.
            UsageError: The model has no matching head.
        """
        if self.head is None:
            raise UsageError(
                f"{self.bundle.path} has no matching head and compares by cosine only",
                "use a bundle of BLIP or BLIP-2, such as Salesforce/blip2-itm-vit-g",
            )
        self._check_open()
        pairs = [(row, self.token_ids(text)) for row, own in enumerate(texts) for text in listed("texts", own)]
        found: list[list[float]] = [[] for _ in images]
        if not pairs:
            return found
        embeds = self._image_embeds(_pictures(images, channels))
        for at in starts(len(pairs), batch_size):
            part = pairs[at : at + batch_size]
            feeds = {"image_embeds": embeds[[row for row, _ in part]], **_padded([ids for _, ids in part])}
            output = "match_logits" if logits else "probability"
            values = self.head.run(feeds, [output])[output]
            values = values[:, 1] if logits else values
            for (row, _), value in zip(part, values, strict=True):
                found[row].append(float(value))
        return found

    def embed_image(self, image: ImageSource, *, channels: Channels = "rgb") -> Vectors:
        """Computes a picture's vector: F numbers with norm 1, float32 ``[F]``.

        BLIP-2 makes K vectors, ``[K, F]``, one for each query; the largest of their cosines with a text counts.
        Arguments and errors are those of :meth:`match`.
        """
        vectors: Vectors = self.embed_images([image], channels=channels)[0]
        return vectors

    def embed_images(
        self, images: Iterable[ImageSource], *, batch_size: int = 1, channels: Channels = "rgb"
    ) -> Vectors:
        """Computes the vectors of N pictures: ``[N, F]``, or K vectors each ``[N, K, F]``; see :meth:`embed_image`."""
        vectors = list(self.embed_images_iter(images, batch_size=batch_size, channels=channels))
        if not vectors:
            raise UsageError("expected at least one picture, got none")
        return np.stack(vectors)

    @overload
    def embed_images_iter(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: Literal[False] = False,
    ) -> Iterator[Vectors]: ...

    @overload
    def embed_images_iter(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: bool,
    ) -> Iterator[Vectors | Blip2EdgeError]: ...

    def embed_images_iter(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: bool = False,
    ) -> Iterator[Vectors | Blip2EdgeError]:
        """Yields the vector of each picture (as from :meth:`embed_image`); arguments as in :meth:`match_many`."""
        self._check_open()
        check_integer("batch_size", batch_size, 1)
        results = in_batches(self._embed_pictures, _pictures(images, channels), batch_size)
        return results if return_exceptions else raising(results)

    def embed_text(self, text: str) -> Vectors:
        """Computes a text's vector: F numbers with norm 1, float32 ``[F]``, to compare with the vectors of pictures."""
        vectors: Vectors = self.embed_texts([text])[0]
        return vectors

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 1, cut: bool = False) -> Vectors:
        """Computes the vectors of N texts, ``[N, F]``; ``cut``: whether to shorten texts that are too long."""
        self._check_open()
        ids = [self.token_ids(text, cut=cut) for text in listed("texts", texts)]
        parts = [self._embed(ids[at : at + batch_size]) for at in starts(len(ids), batch_size)]
        if not parts:
            raise UsageError("expected at least one text, got none")
        return np.concatenate(parts)

    def _encode(self, pictures: list[ImageSource]) -> tuple[Array, Vectors]:
        """Computes ``image_embeds`` and the vectors of one batch of pictures."""
        embeds = self._image_embeds(pictures)
        return embeds, self._features(embeds)

    def _compare(
        self, pictures: list[ImageSource], encoded: tuple[Array, Vectors], texts: Sequence[str], ids: list[list[int]],
        vectors: list[Vectors],
    ) -> list[MatchResult]:  # fmt: skip
        """Compares encoded pictures with texts; ``ids`` and ``vectors`` are the token ids and vectors of the texts."""
        embeds, features = encoded
        cosines = [(features @ vector).max(axis=1) for vector in vectors]
        probabilities = [self._probabilities(embeds, row) for row in ids]
        return [
            MatchResult(
                image=os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else None,
                text=text,
                probability=None if probability is None else float(probability[row]),
                cosine=float(cosine[row]),
            )
            for row, picture in enumerate(pictures)
            for text, cosine, probability in zip(texts, cosines, probabilities, strict=True)
        ]

    def _embed_pictures(self, pictures: list[ImageSource]) -> list[Vectors]:
        """Computes, for each picture of a batch, its vector ``[F]``, or its K vectors ``[K, F]``."""
        vectors = self._features(self._image_embeds(pictures))
        return list(vectors[:, 0] if vectors.shape[1] == 1 else vectors)

    def _image_embeds(self, pictures: list[ImageSource]) -> Array:
        """Runs the vision encoder; returns its outputs ``image_embeds [B, P, Dv]`` at P positions."""
        images = self.images
        pixels = images.preprocessing.batch(pictures, images.limits).astype(images.pixels_dtype, copy=False)
        return images.vision.run({"pixel_values": pixels})["image_embeds"]

    def _features(self, image_embeds: Array) -> Vectors:
        """Computes the K vectors of each picture, ``[B, K, F]``."""
        return self.features.run({"image_embeds": image_embeds})["image_features"].astype(np.float32)

    def _embed(self, ids: list[list[int]]) -> Vectors:
        """Computes the vectors of B texts, each of F numbers, ``[B, F]``."""
        return self.texts.run(_padded(ids))["text_embeds"].astype(np.float32)

    def _probabilities(self, image_embeds: Array, ids: list[int]) -> Vectors | None:
        """Computes the probability ``[B]`` that each picture matches one text; None without a matching head."""
        if self.head is None:
            return None
        text = _padded([ids] * len(image_embeds))
        return self.head.run({"image_embeds": image_embeds, **text}, ["probability"])["probability"]

    def token_ids(self, text: str, *, cut: bool = False) -> list[int]:
        """Returns a text's token ids, with special tokens; ``cut``: whether to shorten a text that is too long.

        Raises:
            PromptError: The text is empty, too long, contains a special token, or has a token that the model lacks.
            UsageError: ``text`` is not a str.
        """
        check_text("text", text)
        if not text.strip():
            raise PromptError("the text is empty", f"give a {option('text')}", field="text")
        manifest = self.bundle.manifest
        check_characters_fit([] if cut else [text], manifest.max_positions, "text")
        self.tokenizer.check_plain(text, (*self.tokenizer.special_tokens, MARKERS[1]), "text")
        ids = self.tokenizer.encode(text)
        ids = [*ids[: manifest.max_positions - 1], ids[-1]] if cut and len(ids) > manifest.max_positions else ids
        if len(ids) > manifest.max_positions:
            raise PromptError(
                f"the text has {len(ids)} tokens, but the model takes at most {manifest.max_positions}",
                "shorten the text",
            )
        if max(ids) >= manifest.vocab_size:
            raise PromptError(
                f"the text contains the token {self.tokenizer.id_to_token(max(ids))!r} (id {max(ids)}), but the model "
                f"has only {manifest.vocab_size} tokens",
                "remove this token from the text",
            )
        return ids


def _padded(rows: list[list[int]]) -> dict[str, Array]:
    """Pads the token ids of one batch of texts on the right; returns ids and mask."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _pictures(images: Iterable[ImageSource], channels: Channels) -> list[ImageSource]:
    """Returns the pictures as a list, with the channels of arrays in the order R, G, B."""
    return [in_rgb(image, channels) for image in listed("images", images)]  # type: ignore[misc]  # no videos
