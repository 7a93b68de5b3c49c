"""From text to the language model's input: where the picture stands, and which tokens stand around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blip2edge.contract import PromptSpec
from blip2edge.errors import PromptError, UsageError
from blip2edge.runtime.embeddings import TokenTable
from blip2edge.runtime.interleave import NONE, looks_at, weave
from blip2edge.runtime.session import Array
from blip2edge.runtime.tokenizer import Tokenizer

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
                "the prompt is empty, and this model begins no text by itself", "give a --prompt"
            )
        largest = max((token for run in prompt.runs for token in run), default=0)
        if largest >= self.vocab_size:
            raise PromptError(
                f"the prompt holds the token {self.tokenizer.id_to_token(largest)!r} (id {largest}), which the "
                f"language model with its {self.vocab_size} tokens does not know",
                "leave it out",
            )
