"""Chooses the draft model of each text: the Q-Former's text head, prompt lookup, or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import (
    DECODER,
    DRAFT,
    DRAFT_TOKENIZER_FILE,
    DRAFTS,
    QUERIES,
    Axis,
    DraftName,
    DraftSpec,
)
from blip2edge.errors import UsageError, option
from blip2edge.runtime.backends.base import Session, find_backend
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.speculative import (
    MAX_DRAFT_TOKENS,
    TIE_MARGIN,
    TIE_MARGIN_QUANTIZED,
    DraftModel,
    PromptLookup,
    SpeculationCost,
    Speculator,
)
from blip2edge.runtime.text.tokenizer import Tokenizer

SPARE = 2
"""Number of tokens that a draft model generates in addition, because the last word of a draft is removed if it is
incomplete."""

CLOCKS: Mapping[str, Callable[[], float]] = {"auto": time.thread_time, "cpu": time.thread_time}
"""Clocks by backend, which measure if speculative decoding saves time. ONNX Runtime on the CPU also computes in the
calling thread, and the CPU time of this thread does not depend on other processes. Other backends have no entry: their
wall time is measured."""


class TextHeadGraph:
    """The Q-Former's text head (``draft.onnx``) as a draft model, with both tokenizers.

    Args:
        session: The loaded graph.
        spec: Special tokens and KV cache of the text head.
        tokenizer: The tokenizer of ``draft_tokenizer.json``.
        language: The language model's tokenizer.
        end_id: The language model's end token; None if it has none.
    """

    def __init__(
        self, session: Session, spec: DraftSpec, tokenizer: Tokenizer, language: Tokenizer, end_id: int | None
    ) -> None:
        self.session = session
        self.spec = spec
        self.tokenizer = tokenizer
        self.language = language
        self.end_id = end_id

    def row(self, pictures: Mapping[str, Array], row: int) -> TextHeadDraft:
        """Makes the draft model for the text of one picture.

        Args:
            pictures: The bridge's outputs by name; they include the keys and values of the query tokens.
            row: Index of the picture in ``pictures``.
        """
        names = zip(self.spec.past_names(), self.spec.names(QUERIES), strict=True)
        return TextHeadDraft(self, {past: pictures[name][row : row + 1] for past, name in names})


class TextHeadDraft:
    """Proposes tokens of one text with the text head; implements :class:`DraftModel`.

    Args:
        head: The text head's graph and the tokenizers.
        queries: Keys and values of the bridge's query tokens, ``[1, H, Q, d]`` by name. They are the first entries of
            the text head's KV cache, through which the text head attends to the picture.
    """

    def __init__(self, head: TextHeadGraph, queries: Mapping[str, Array]) -> None:
        self._head = head
        self._past = dict(queries)
        self._queries = next(iter(queries.values())).shape[2]
        self._text: list[int] = []  # after [DEC]
        self._cached = 0  # tokens in the KV cache, [DEC] included
        self._ended = False

    def propose(self, generated: Sequence[int], most: int) -> list[int]:
        """Proposes tokens that continue the text of the language model; see :class:`DraftModel`.

        If the draft text does not begin with the text of the language model, it is first replaced by that text.
        """
        written = self._head.language.decode(generated)
        prefix = self._head.tokenizer.encode(written.strip(), add_special_tokens=False)
        if remainder(written, self._decoded()) is None:
            self._restart(prefix)
        self._extend(len(prefix) + most + SPARE)
        rest = remainder(written, self._decoded())
        if rest is None:
            return []
        if not self._ended and " " in rest:
            rest = rest[: rest.rindex(" ")]
        ids = self._retokenized(list(generated), written, rest)
        if self._ended and self._head.end_id is not None:
            ids.append(self._head.end_id)
        return ids[:most]

    def _decoded(self) -> str:
        return self._head.tokenizer.decode(self._text)

    def _retokenized(self, generated: list[int], written: str, rest: str) -> list[int]:
        """Returns the language model's tokens for the text ``rest``, which follows the text ``written``."""
        language = self._head.language
        whole = language.encode(written + rest, add_special_tokens=False)
        if whole[: len(generated)] == generated:
            return whole[len(generated) :]
        return language.encode(rest, add_special_tokens=False)

    def _restart(self, prefix: list[int]) -> None:
        """Replaces the draft text by ``prefix``; the KV cache of the common beginning of both texts is used again."""
        same = next(
            (at for at, pair in enumerate(zip(prefix, self._text, strict=False)) if pair[0] != pair[1]),
            min(len(prefix), len(self._text)),
        )
        self._cached = min(self._cached, same + 1, len(prefix))  # the graph needs at least one new token
        kept = self._queries + self._cached
        self._past = {name: array[:, :, :kept] for name, array in self._past.items()}
        self._text, self._ended = list(prefix), False

    def _extend(self, count: int) -> None:
        """Adds tokens to the draft text, by greedy decoding, until it has ``count`` tokens or ends."""
        spec = self._head.spec
        while len(self._text) < min(count, spec.max_positions - 1) and not self._ended:
            token = self._next()
            self._ended = token == spec.end_token_id
            if not self._ended:
                self._text.append(token)

    def _next(self) -> int:
        """Runs the graph on the tokens that are not in the KV cache; returns the likeliest next token."""
        spec = self._head.spec
        fresh = [spec.dec_token_id, *self._text][self._cached :]
        steps, total = len(fresh), self._queries + self._cached + len(fresh)
        outputs = self._head.session.run(
            {
                "input_ids": np.array([fresh], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "text_positions": np.arange(self._cached, self._cached + steps)[None],
                "logits_indices": np.array([[steps - 1]], np.int64),
                **self._past,
            }
        )
        names = zip(spec.past_names(), spec.present_names(), strict=True)
        self._past = {past: outputs[present] for past, present in names}
        self._cached += steps
        return int(outputs["logits"][0, 0].argmax())


def remainder(written: str, drafted: str) -> str | None:
    """Returns the rest of the text ``drafted`` after its beginning ``written``; None if it begins differently.

    The comparison ignores spaces and case.
    """
    at = 0
    for character in written:
        if character.isspace():
            continue
        while at < len(drafted) and drafted[at].isspace():
            at += 1
        if at == len(drafted) or drafted[at].lower() != character.lower():
            return None
        at += 1
    return drafted[at:]


class DraftSelector:
    """Chooses the draft model of each text; one measurement for all texts decides whether drafts save time.

    Args:
        head: The text head; None if the bundle has none, or if it was not requested.
        default: Draft model for texts whose options do not set ``draft``; one of
            :data:`blip2edge.bundle.schema.DRAFTS`.
        tie_margin: See :data:`blip2edge.runtime.decoding.speculative.TIE_MARGIN`.
        most: Largest number of tokens that are proposed at once.
        clock: Returns the time in seconds.

    Attributes:
        default: The argument ``default``; but ``none`` if it is ``auto`` and there is no text head.
    """

    def __init__(
        self,
        head: TextHeadGraph | None = None,
        default: str = "auto",
        tie_margin: float = TIE_MARGIN["fp32"],
        most: int = MAX_DRAFT_TOKENS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.head = head
        self.default = "none" if default == "auto" and head is None else default
        self.costs = {kind: SpeculationCost(clock) for kind in ("lookup", "itg")}
        self._asked = default
        self._tie_margin, self._most = tie_margin, most

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        open_graph: Callable[[str], Session],
        tokenizer: Tokenizer,
        default: DraftName,
        backend: str = "auto",
    ) -> DraftSelector:
        """Loads the draft model of a bundle, and returns the object that chooses draft models.

        Args:
            bundle: An opened bundle.
            open_graph: Loads a graph by name.
            tokenizer: The language model's tokenizer.
            default: Draft model for texts whose options do not set ``draft``. The text head is loaded for ``auto`` and
                ``itg``. With engines, ``auto`` means ``none``.
            backend: The backend of the graphs; it selects the clock from :data:`CLOCKS`.

        Raises:
            UsageError: ``default`` is unknown, or it is ``itg`` and the bundle has no text head.
        """
        manifest = bundle.manifest
        head = None
        if default == "auto" and backend != "auto" and find_backend(backend).engines:
            default = "none"  # engines choose tokens on the GPU, step after step; a draft would need the host
        if manifest.draft is not None and DRAFT in manifest.graphs and default in ("auto", "itg"):
            ends = manifest.generation["eos_token_ids"]
            words = Tokenizer.from_file(bundle.file(DRAFT_TOKENIZER_FILE))
            head = TextHeadGraph(open_graph(DRAFT), manifest.draft, words, tokenizer, ends[0] if ends else None)
        record = bundle.graph(DECODER)
        logits = record.spec.outputs[0].dims[1]
        most = min(MAX_DRAFT_TOKENS, (logits.max if isinstance(logits, Axis) else logits) - 1)
        tie_margin = TIE_MARGIN.get(record.precision, TIE_MARGIN_QUANTIZED)
        drafts = cls(head, default, tie_margin, most, CLOCKS.get(backend, time.perf_counter))
        drafts.check(GenerationOptions(draft=default))
        return drafts

    def check(self, options: GenerationOptions) -> None:
        """Raises UsageError if the options name a draft model that is not loaded."""
        if options.draft == "itg" and self.head is None:
            if self._asked not in ("auto", "itg"):
                raise UsageError(
                    f"{option('draft')} itg: the captioner was loaded with draft={self._asked!r}",
                    "load the captioner with draft='itg'",
                )
            raise UsageError(
                f"{option('draft')} itg: the bundle has no draft model",
                f"use {option('draft')} {' or '.join(kind for kind in DRAFTS if kind != 'itg')}, "
                "or export a checkpoint with a draft model (draft.safetensors)",
            )

    def kind(self, options: GenerationOptions) -> str:
        """Returns the name of the draft model for these options: ``itg``, ``lookup`` or ``none``."""
        if options.num_beams > 1:
            return "none"
        if options.draft == "auto":
            return "itg" if self.head is not None and not options.sampling else "none"
        return options.draft

    def speculator(
        self, options: GenerationOptions, prompt_ids: Sequence[int], pictures: Mapping[str, Array], row: int
    ) -> Speculator | None:
        """Makes the object that decodes one text with a draft model; None for plain decoding.

        Args:
            options: The text's options.
            prompt_ids: The ids of the text's prompt.
            pictures: The outputs of vision encoder and bridge by name.
            row: Index of the text's row in ``pictures``.
        """
        kind = self.kind(options)
        if kind == "none":
            return None
        draft: DraftModel = PromptLookup(prompt_ids)
        if kind == "itg" and self.head is not None:
            draft = self.head.row(pictures, row)
        return Speculator(draft, self.costs[kind], self._tie_margin, self._most)
