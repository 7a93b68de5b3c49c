"""From text to the language model's input: where the picture stands, and which tokens stand around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import INSTRUCTION, MARKERS, PromptSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import PromptError, UsageError, option
from blip2edge.runtime.images.preprocess import ImageSource
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.tokenizer import Tokenizer

NONE = -1
"""What a token looks at before the first picture."""


def separate(items: Sequence[ItemSource]) -> list[list[ImageSource]]:
    """The pictures of each item, one or several.

    Raises:
        UsageError: An item has none.
    """
    groups = [list(item) if isinstance(item, (list, tuple)) else [item] for item in items]
    if not all(groups):
        raise UsageError("expected at least one picture for every prompt, got none")
    return groups  # type: ignore[return-value]  # preprocessing refuses what is no picture


def weave(spec: PromptSpec, text: str, pictures: int) -> str:
    """The text with a marker a picture, as transformers' IdeficsProcessor writes it.

    Args:
        spec: The template, and the tokens that stand for a picture.
        text: With a marker of :data:`MARKERS` a picture; with none it goes into the template, and all pictures
            stand where that has one. Spaces around a picture are dropped.
        pictures: How many there are.

    Raises:
        UsageError: There are more or fewer markers than pictures.
    """
    parts = _split(text)
    if len(parts) == 1:
        before, _, after = spec.template.partition(MARKERS[0])
        parts = _split(before + MARKERS[0] * pictures + after)
        parts = [part.replace("{prompt}", text) for part in parts]
    if len(parts) - 1 != pictures:
        raise UsageError(
            f"the prompt has {len(parts) - 1} places for pictures, but there are {pictures}",
            f"write {MARKERS[1]} where each picture stands, or give a prompt without it",
        )
    woven = parts[0].strip(" ")
    after_picture = False
    for part in parts[1:]:
        begin = "" if after_picture else spec.around_picture
        woven += begin + spec.picture_token + spec.around_picture + part.strip(" ")
        after_picture = not part.strip(" ")
    return woven


def _split(text: str) -> list[str]:
    for marker in MARKERS:
        text = text.replace(marker, MARKERS[0])
    return text.split(MARKERS[0])


def looks_at(ids: Sequence[int], picture_id: int, end_id: int | None) -> tuple[int, ...]:
    """Which picture each token looks at: the last one, its own marker's included; behind an end token none."""
    looks: list[int] = []
    count, at = 0, NONE
    for token in ids:
        if token == picture_id:
            at, count = count, count + 1
        looks.append(at)
        if token == end_id:
            at = NONE
    return tuple(looks)


def pack(array: Array, counts: Sequence[int]) -> Array:
    """What was made of all pictures, side by side for each item.

    Args:
        array: ``[N, Q, D]``, one item's pictures after the other's.
        counts: How many each of the B items has; together N.

    Returns:
        ``[B, max(counts) * Q, D]``, zeros behind those of an item with fewer.
    """
    _, slots, width = array.shape
    packed = np.zeros((len(counts), max(counts), slots, width), array.dtype)
    start = 0
    for row, count in enumerate(counts):
        packed[row, :count] = array[start : start + count]
        start += count
    return packed.reshape(len(counts), -1, width)


def look_mask(looks: Sequence[Sequence[int]], pictures: int, keys: int) -> NDArray[np.int64]:
    """The decoder's ``cross_attention_mask``.

    Args:
        looks: From :func:`looks_at`, a row each.
        pictures: The largest number of pictures of a row.
        keys: E, their slots.

    Returns:
        ``[B, S, E]``, padded on the left as the prompts are.
    """
    longest = max(map(len, looks))
    owner = np.arange(keys) // (keys // pictures)  # which picture a key is of
    mask = np.zeros((len(looks), longest, keys), np.int64)
    for row, chosen in enumerate(looks):
        mask[row, longest - len(chosen) :] = np.array(chosen, np.int64)[:, None] == owner
    return mask


IMAGE = "{image}"


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt: runs of token ids, with a picture between any two.

    Attributes:
        runs: One more than there are pictures.
        visual_tokens: Slots of a picture.
        image_token_id: What stands for a slot in :attr:`ids`.
        pictures: How many there are.
        looks: Where pictures take no slots: which of them each token looks at, -1 for none.
    """

    runs: tuple[tuple[int, ...], ...]
    visual_tokens: int
    image_token_id: int | None
    pictures: int = 1
    looks: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Slots in all."""
        return sum(map(len, self.runs)) + (len(self.runs) - 1) * self.visual_tokens

    @property
    def ids(self) -> list[int]:
        """The ids as transformers' ``input_ids`` hold them: what the repetition penalty sees."""
        slots = [] if self.image_token_id is None else [self.image_token_id] * self.visual_tokens
        ids = list(self.runs[0])
        for run in self.runs[1:]:
            ids += [*slots, *run]
        return ids

    def embed(self, table: TokenTable, visual_tokens: Array | None) -> Array:
        """``visual_tokens [Q, D]`` and the table's rows, in order: ``[S, D]``; None where they take no slots."""
        parts = [table.rows(self.runs[0])]
        for run in self.runs[1:]:
            parts += [table.rows(run)] if visual_tokens is None else [visual_tokens, table.rows(run)]
        dtype = parts[0].dtype if visual_tokens is None else visual_tokens.dtype
        return np.concatenate([part.astype(dtype, copy=False) for part in parts])


class Prompter:
    """Makes prompts by a family's template.

    Args:
        spec: The template and its ids.
        tokenizer: The language model's.
        max_positions: Longest context.
        vocab_size: Rows of the token table.
    """

    def __init__(self, spec: PromptSpec, tokenizer: Tokenizer, max_positions: int, vocab_size: int) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.vocab_size = vocab_size

    def question(self, question: str) -> str:
        """The prompt that asks ``question``.

        Raises:
            UsageError: The model answers none.
        """
        if not self.spec.question:
            raise UsageError(
                "this bundle captions pictures and answers no questions",
                "use blip2edge caption, or export a checkpoint that was trained for questions",
            )
        return self.spec.question.replace("{question}", question)

    def filled(self, text: str | None) -> str | None:
        """The prompt, or the bundle's default where none is given."""
        return self.spec.default if text is None else text

    def __call__(self, text: str | None, pictures: int = 1) -> Prompt:
        """Tokenises a prompt.

        Args:
            text: What stands in place of ``{prompt}``; None for the family's empty prompt (a lone BOS).
            pictures: How many pictures it holds.

        Raises:
            PromptError: It is longer than the context, or has a token that the model lacks.
        """
        if text is None and self.spec.required:
            raise UsageError(
                "this bundle answers questions, and none was given",
                "use: blip2edge ask IMAGE QUESTION -b BUNDLE",
            )
        if self.spec.picture_token:
            return self._interleaved(text or "", pictures)
        templates = self.spec.template.split(IMAGE)
        parts = [template.replace("{prompt}", text or "") for template in templates]
        if self.spec.image_token:
            runs = self._around_tokens(parts)
        else:
            runs, special = [], True
            for template, part in zip(templates, parts, strict=True):
                runs.append(self._tokens(part, special, text is None) if template else [])
                special = special and not template
        prompt = Prompt(tuple(map(tuple, runs)), self.spec.visual_tokens, self.spec.image_token_id)
        self._check(prompt)
        return prompt

    def _interleaved(self, text: str, pictures: int) -> Prompt:
        """One run of tokens, markers among them: the text is tokenised whole, as transformers does it."""
        bos, end = self.spec.bos_token_id, self.spec.end_token_id
        start = (self.tokenizer.id_to_token(bos) if bos is not None else None) or ""
        ids = self.tokenizer.encode(start + weave(self.spec, text, pictures), add_special_tokens=False)
        marker = self.tokenizer.token_to_id(self.spec.picture_token)
        looks = looks_at(ids, NONE if marker is None else marker, end)
        prompt = Prompt((tuple(ids),), 0, None, pictures, looks)
        self._check(prompt)
        return prompt

    def _around_tokens(self, parts: Sequence[str]) -> list[list[int]]:
        """The runs between the pictures' own tokens, the text being tokenised whole, as the processor does it."""
        token = self.spec.image_token
        runs: list[list[int]] = [[]]
        for token_id in self.tokenizer.encode(token.join(parts)):
            if token_id == self.spec.image_token_id:
                runs.append([])
            else:
                runs[-1].append(token_id)
        if len(runs) != len(parts):
            raise PromptError(f"the prompt holds {token}, which stands for a picture", "leave it out")
        return runs

    def _tokens(self, run: str, special: bool, is_default: bool) -> list[int]:
        if is_default and not run and self.spec.bos_token_id is not None:
            return [self.spec.bos_token_id]
        if not self.spec.framed and self.spec.bos_token_id is not None:
            return [self.spec.bos_token_id, *self.tokenizer.encode(run, add_special_tokens=False)]
        return self.tokenizer.encode(run, add_special_tokens=special)

    def _check(self, prompt: Prompt) -> None:
        if prompt.length > self.max_positions:
            raise PromptError(
                f"the prompt takes {prompt.length} slots ({self.spec.visual_tokens} of them for the picture), but the "
                f"language model's context has {self.max_positions}",
                "shorten the prompt",
            )
        if prompt.length == 0:
            raise PromptError(
                "the prompt is empty, and this model begins no text by itself",
                f"give a {option('prompt')}",
                field="prompt",
            )
        largest = max((token for run in prompt.runs for token in run), default=0)
        if largest >= self.vocab_size:
            raise PromptError(
                f"the prompt holds the token {self.tokenizer.id_to_token(largest)!r} (id {largest}), which the "
                f"language model with its {self.vocab_size} tokens does not know",
                "leave it out",
            )


class Instructor:
    """Tokenises the instructions of a batch.

    Args:
        tokenizer: The Q-Former's.
        longest: Positions that the Q-Former has.
        frames: Pictures an item; each is read with the item's instruction.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int, frames: int) -> None:
        self.tokenizer = tokenizer
        self.longest = longest
        self.frames = frames

    def __call__(self, texts: Sequence[str | None]) -> dict[str, Array]:
        """The bridge's inputs beside the picture.

        Args:
            texts: B instructions.

        Returns:
            ``instruction_ids`` and ``instruction_mask`` int64 ``[B * frames, T]``, padded on the right: an
            instruction's tokens have the positions that they have alone.

        Raises:
            PromptError: There is none for a picture, or it is longer than the Q-Former's table of positions.
        """
        rows = [self._tokens(text) for text in texts]
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
                "this model looks at a picture with an instruction in mind, and there is none",
                f"give a {option('prompt')}",
                field="prompt",
            )
        tokens = self.tokenizer.encode(text)
        if len(tokens) > self.longest:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but the Q-Former reads at most {self.longest}",
                "shorten the prompt",
            )
        return tokens
