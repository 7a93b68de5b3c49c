"""Converts prompts (a text and its images) to token ids, and to the language model's input embeddings.

Three kinds of prompt (``PromptSpec.kind``):

- ``segments``: each text before and after an image is tokenized alone; visual tokens are put between them (BLIP-2).
- ``placeholder``: the whole text is tokenized, with a special token in the place of each image (LLaVA).
- ``interleaved``: a marker token stands for each image, and a token attends to the last image before it (Flamingo).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.prompt_spec import INTERLEAVED, MARKERS, PLACEHOLDER, SEGMENTS, PromptSpec
from blip2edge.bundle.schema import INSTRUCTION
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import PromptError, UsageError, option
from blip2edge.runtime.text.tokenizer import Tokenizer, check_characters_fit, reserved_texts

NO_IMAGE = -1
"""Value in :attr:`Prompt.attends_to` for a token that attends to no image."""


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt: texts (segments) with the visual tokens of an image between two segments.

    Attributes:
        segments: Token ids of each segment. An interleaved prompt is one segment.
        visual_tokens: Number of slots that an image takes in the context.
        image_token_id: Token id that stands for each visual token in :attr:`ids`; None for no placeholder.
        images: Number of images.
        attends_to: For interleaved prompts, the index of the image that each token attends to, or :data:`NO_IMAGE`.
    """

    segments: tuple[tuple[int, ...], ...]
    visual_tokens: int
    image_token_id: int | None
    images: int = 1
    attends_to: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Returns the length of the whole prompt in tokens, visual tokens included."""
        return sum(map(len, self.segments)) + (len(self.segments) - 1) * self.visual_tokens

    @property
    def ids(self) -> list[int]:
        """Returns the token ids as in transformers' ``input_ids``; logits processors get these ids."""
        slots = [] if self.image_token_id is None else [self.image_token_id] * self.visual_tokens
        ids = list(self.segments[0])
        for segment in self.segments[1:]:
            ids += [*slots, *segment]
        return ids

    def embed(self, table: TokenTable, visual_tokens: Array | None) -> Array:
        """Makes the decoder's input ``[S, D]`` for S slots: token embeddings, and visual tokens in place of images.

        Args:
            table: The token embedding table.
            visual_tokens: Q visual tokens ``[Q, D]`` to put between the segments; None if images take no slots.
        """
        parts = [table.rows(self.segments[0])]
        for segment in self.segments[1:]:
            parts += [table.rows(segment)] if visual_tokens is None else [visual_tokens, table.rows(segment)]
        dtype = parts[0].dtype if visual_tokens is None else visual_tokens.dtype
        return np.concatenate([part.astype(dtype, copy=False) for part in parts])


@dataclass(frozen=True)
class Dialog:
    """The texts of a conversation, for bundles whose prompt has a place for them (``PromptSpec.turns``).

    Attributes:
        messages: The kind of each message (``system``, ``picture``, ``user`` or ``assistant``) and its text. One
            message is a ``picture``; the last message is ``picture`` or ``user``.
    """

    messages: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """Returns the text of the last message."""
        return self.texts[-1]

    @property
    def texts(self) -> list[str]:
        """Returns the texts of all messages."""
        return [text for _, text in self.messages]

    def parts(self, turns: Mapping[str, str]) -> list[str]:
        """Puts all messages into the templates ``turns``; returns the texts before and after the picture."""
        head = () if self.messages[0][0] == "system" else (("head", ""),)
        parts = [""]
        for kind, text in (*head, *self.messages, ("start", "")):
            first, *others = (part.replace("{prompt}", text) for part in turns[kind].split(MARKERS[0]))
            parts = [*parts[:-1], parts[-1] + first, *others]
        return parts


PromptText = str | Dialog
"""A prompt from the user: a text or a conversation."""

Text = TypeVar("Text", bound=PromptText)


class PromptBuilder:
    """Makes prompts from texts with the template of the model's family.

    Args:
        spec: The template and its special tokens.
        tokenizer: The language model's tokenizer.
        max_positions: Longest context in tokens.
        vocab_size: Number of rows of the token embedding table.
    """

    def __init__(self, spec: PromptSpec, tokenizer: Tokenizer, max_positions: int, vocab_size: int) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.vocab_size = vocab_size
        self._reserved = reserved_texts(spec, tokenizer)
        kinds = {SEGMENTS: self._segments, PLACEHOLDER: self._around_placeholders, INTERLEAVED: self._interleaved}
        self._tokenize = kinds[spec.kind]

    def question(self, question: str) -> str:
        """Puts ``question`` into the family's question template; returns the prompt.

        Raises:
            UsageError: The model's family has no question template.
        """
        if not self.spec.question:
            raise UsageError(
                "this bundle generates captions and cannot answer questions",
                "caption the picture instead, or export a checkpoint that was trained for questions",
            )
        return self.spec.question.replace("{question}", question)

    def with_default(self, text: Text | None) -> Text | str | None:
        """Returns ``text``, or the bundle's default prompt for None; raises PromptError if ``text`` is too long."""
        check_characters_fit(text.texts if isinstance(text, Dialog) else [text or ""], self.max_positions)
        return self.spec.default if text is None else text

    def __call__(self, text: PromptText | None, images: int = 1, queries: int | None = None) -> Prompt:
        """Tokenizes a prompt.

        Args:
            text: Replaces ``{prompt}`` in the template; None for the family's empty prompt (only a BOS token).
            images: Number of images of an interleaved prompt.
            queries: Number of visual tokens of each image or frame; None for all.

        Raises:
            PromptError: The prompt is longer than the context, or contains a reserved text or an unknown token.
            UsageError: ``text`` is None and the model needs a prompt, or ``text`` lacks a place for each image.
        """
        if text is None and self.spec.required:
            raise UsageError(
                "this bundle answers questions, but no question was given",
                "use ask, with a picture and a question",
            )
        for written in text.texts if isinstance(text, Dialog) else [text or ""]:
            self.tokenizer.check_plain(written, self._reserved)
        prompt = self._tokenize(text, images)
        if queries and prompt.visual_tokens:
            prompt = replace(prompt, visual_tokens=queries * self.spec.frames)
        self._check(prompt)
        return prompt

    def _parts(self, text: PromptText | None) -> list[str]:
        """Returns the texts before and after each picture."""
        if isinstance(text, Dialog):
            return text.parts(self.spec.turns)
        return [part.replace("{prompt}", text or "") for part in self.spec.template.split(MARKERS[0])]

    def _segments(self, text: PromptText | None, _images: int) -> Prompt:
        """Tokenizes the texts before and after the images one by one; the first non-empty text gets special tokens."""
        templates = self._parts("{prompt}" if text is None or isinstance(text, str) else text)
        segments, special = [], True
        for part, filled in zip(templates, self._parts(text), strict=True):
            segments.append(self._segment(filled, special, text is None) if part else [])
            special = special and not part
        return self._with_slots(segments)

    def _segment(self, text: str, special: bool, is_default: bool) -> list[int]:
        bos = self.spec.bos_token_id
        if is_default and not text and bos is not None:
            return [bos]
        if not self.spec.framed and bos is not None:
            return [bos, *self.tokenizer.encode(text, add_special_tokens=False)]
        return self.tokenizer.encode(text, add_special_tokens=special)

    def _around_placeholders(self, text: PromptText | None, _images: int) -> Prompt:
        """Tokenizes the whole text, as transformers' processor does; then splits the ids at the placeholders."""
        segments: list[list[int]] = [[]]
        for token_id in self.tokenizer.encode(self.spec.image_token.join(self._parts(text)), self.spec.framed):
            if token_id == self.spec.image_token_id:
                segments.append([])
            else:
                segments[-1].append(token_id)
        return self._with_slots(segments)

    def _with_slots(self, segments: Sequence[Sequence[int]]) -> Prompt:
        return Prompt(tuple(map(tuple, segments)), self.spec.visual_tokens, self.spec.image_token_id)

    def _interleaved(self, text: PromptText | None, images: int) -> Prompt:
        """Tokenizes the whole text, with a marker for each image, as one segment, as transformers does."""
        bos, end = self.spec.bos_token_id, self.spec.end_token_id
        start = (self.tokenizer.id_to_token(bos) if bos is not None else None) or ""
        whole = start + interleave(self.spec, str(text or ""), images)
        ids = self.tokenizer.encode(whole, add_special_tokens=False)
        marker = self.tokenizer.token_to_id(self.spec.picture_token)
        attends_to = attended_images(ids, NO_IMAGE if marker is None else marker, end)
        return Prompt((tuple(ids),), 0, None, images, attends_to)

    def _check(self, prompt: Prompt) -> None:
        if prompt.length > self.max_positions:
            raise PromptError(
                f"the prompt has {prompt.length} tokens ({prompt.visual_tokens} of them visual tokens), but the "
                f"language model's context has {self.max_positions} tokens",
                "shorten the prompt",
            )
        if prompt.length == 0:
            problem = "the prompt is empty, and this model cannot start a text without a prompt"
            raise PromptError(problem, f"give a {option('prompt')}", field="prompt")
        largest = max((token for segment in prompt.segments for token in segment), default=0)
        if largest >= self.vocab_size:
            raise PromptError(
                f"the prompt contains the token {self.tokenizer.id_to_token(largest)!r} (id {largest}), but the "
                f"language model has only {self.vocab_size} tokens",
                "remove this token from the prompt",
            )


class InstructionTokenizer:
    """Tokenizes instructions for the bridge, whose Q-Former also reads the instruction (InstructBLIP).

    Args:
        tokenizer: The Q-Former's tokenizer.
        longest: Largest number of tokens in an instruction: the length of the Q-Former's position table.
        frames: Number of pictures of an item (frames of a video); each is encoded with the item's instruction.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int, frames: int) -> None:
        self.tokenizer = tokenizer
        self.longest = longest
        self.frames = frames

    def __call__(self, texts: Sequence[PromptText | None]) -> dict[str, Array]:
        """Makes the bridge's text inputs from instructions.

        Args:
            texts: B instructions.

        Returns:
            ``instruction_ids`` and ``instruction_mask`` int64 ``[B * frames, T]``, padded on the right to the longest
            instruction (T tokens), so that the positions of an instruction do not depend on the batch.

        Raises:
            PromptError: An instruction is missing, contains a special token of the Q-Former, or is longer than the
                Q-Former's position table.
        """
        rows = [self._tokens(None if text is None else str(text)) for text in texts]
        ids = np.zeros((len(rows), max(1, *map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        arrays = (ids.repeat(self.frames, axis=0), mask.repeat(self.frames, axis=0))
        return dict(zip(INSTRUCTION, arrays, strict=True))

    def _tokens(self, text: str | None) -> list[int]:
        if text is None:
            raise PromptError(
                "this model needs an instruction to encode a picture, but none was given",
                f"give a {option('prompt')}",
                field="prompt",
            )
        self.tokenizer.check_plain(text, self.tokenizer.special_tokens)
        tokens = self.tokenizer.encode(text)
        if len(tokens) > self.longest:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but the Q-Former takes at most {self.longest}",
                "shorten the prompt",
            )
        return tokens


def interleave(spec: PromptSpec, text: str, images: int) -> str:
    """Replaces the image markers in a text by the model's image tokens, as transformers' IdeficsProcessor does.

    Args:
        spec: The template, and the tokens that mark an image.
        text: The text with a marker of :data:`MARKERS` for each image; spaces around it are removed. A text without
            markers is put into the template, and all images into the place of the template's marker.
        images: Number of images.

    Raises:
        UsageError: There are more or fewer markers than images.
    """
    parts = _split(text)
    if len(parts) == 1:
        before, _, after = spec.template.partition(MARKERS[0])
        parts = _split(before + MARKERS[0] * images + after)
        parts = [part.replace("{prompt}", text) for part in parts]
    if len(parts) - 1 != images:
        raise UsageError(
            f"the prompt has {len(parts) - 1} picture markers, but {images} pictures were given",
            f"write {MARKERS[1]} at the place of each picture, or write no marker: then all pictures come before the "
            "prompt",
        )
    result = parts[0].strip(" ")
    after_image = False
    for part in parts[1:]:
        begin = "" if after_image else spec.around_picture
        result += begin + spec.picture_token + spec.around_picture + part.strip(" ")
        after_image = not part.strip(" ")
    return result


def _split(text: str) -> list[str]:
    for marker in MARKERS:
        text = text.replace(marker, MARKERS[0])
    return text.split(MARKERS[0])


def attended_images(ids: Sequence[int], image_id: int, end_id: int | None) -> tuple[int, ...]:
    """Returns, for each token, the index of the last image up to this token; after an end token :data:`NO_IMAGE`."""
    attends_to: list[int] = []
    count, current = 0, NO_IMAGE
    for token in ids:
        if token == image_id:
            current, count = count, count + 1
        attends_to.append(current)
        if token == end_id:
            current = NO_IMAGE
    return tuple(attends_to)


def pack_images(array: Array, counts: Sequence[int]) -> Array:
    """Concatenates the visual tokens of each item's images, so that each item is one row.

    Args:
        array: ``[N, Q, D]``, the Q visual tokens of each of N images, item by item.
        counts: Number of images of each of the B items; their sum is N.

    Returns:
        ``[B, max(counts) * Q, D]``; items with fewer images are padded with zeros at the end.
    """
    _, slots, width = array.shape
    packed = np.zeros((len(counts), max(counts), slots, width), array.dtype)
    start = 0
    for row, count in enumerate(counts):
        packed[row, :count] = array[start : start + count]
        start += count
    return packed.reshape(len(counts), -1, width)


def cross_attention_mask(attends_to: Sequence[Sequence[int]], images: int, keys: int) -> NDArray[np.int64]:
    """Makes the decoder's ``cross_attention_mask`` for interleaved prompts.

    Args:
        attends_to: Result of :func:`attended_images` for the prompt of each row.
        images: Largest number of images in a row.
        keys: E, number of visual tokens in a row with this number of images.

    Returns:
        int64 ``[B, S, E]`` for S slots: 1 where a token attends to a visual token; padded on the left like the prompts.
    """
    longest = max(map(len, attends_to))
    owner = np.arange(keys) // (keys // images)  # the image that a key belongs to
    mask = np.zeros((len(attends_to), longest, keys), np.int64)
    for row, chosen in enumerate(attends_to):
        mask[row, longest - len(chosen) :] = np.array(chosen, np.int64)[:, None] == owner
    return mask


def left_padded(
    prompts: Sequence[Array], dtype: np.dtype[np.generic]
) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    """Joins embedded prompts into one batch, padded on the left, so that all rows continue in the same slot.

    Args:
        prompts: One embedded prompt ``[S_i, D]`` for each row i.
        dtype: dtype of the returned batch.

    Returns:
        The batch ``[B, S, D]`` (S: the longest S_i); the mask ``[B, S]``, 1 for a token; the positions ``[B, S]``.
    """
    longest = max(len(prompt) for prompt in prompts)
    embeds = np.zeros((len(prompts), longest, prompts[0].shape[1]), dtype)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return embeds, mask, np.maximum(mask.cumsum(axis=1) - 1, 0)
