"""Who drafts for a captioner, and for which of its texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.manifest import Bundle
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
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.speculative import (
    CLOSE,
    CLOSE_QUANTISED,
    MOST_DRAFTED,
    Ahead,
    Drafter,
    Lookup,
    Payoff,
)
from blip2edge.runtime.text.tokenizer import Tokenizer

SPARE = 2
"""Tokens that are written beyond what is asked for, as the last word may not be whole."""


class DraftHead:
    """``draft.onnx`` and its tokenizer, and the language model's.

    Args:
        session: The loaded graph.
        spec: Its special tokens and its cache.
        tokenizer: ``draft_tokenizer.json``.
        language: The language model's.
        end_id: What ends the language model's texts; None for nothing.
    """

    def __init__(
        self, session: Session, spec: DraftSpec, tokenizer: Tokenizer, language: Tokenizer, end_id: int | None
    ) -> None:
        self.session = session
        self.spec = spec
        self.tokenizer = tokenizer
        self.language = language
        self.end_id = end_id

    def row(self, pictures: Mapping[str, Array], row: int) -> DraftText:
        """A draft of one picture's text.

        Args:
            pictures: The bridge's outputs.
            row: Which of its rows.
        """
        names = zip(self.spec.past_names(), self.spec.names(QUERIES), strict=True)
        return DraftText(self, {past: pictures[name][row : row + 1] for past, name in names})


class DraftText:
    """One text of the draft; it follows the ``Drafter`` protocol of ``speculate.py``.

    Args:
        head: The graph and its tokenizers.
        queries: The queries' keys and values by the names of the cache, ``[1, H, Q, d]``.
    """

    def __init__(self, head: DraftHead, queries: Mapping[str, Array]) -> None:
        self._head = head
        self._past = dict(queries)
        self._queries = next(iter(queries.values())).shape[2]
        self._text: list[int] = []  # behind [DEC]
        self._read = 0  # tokens that the graph has read, [DEC] included
        self._ended = False

    def propose(self, generated: Sequence[int], most: int) -> list[int]:
        """See ``Drafter``: the rest of the draft's text where it begins as the language model's does.

        Where the two part, the draft takes over what the language model has written and goes on from there.
        """
        written = self._head.language.decode(generated)
        anchor = self._head.tokenizer.encode(written.strip(), add_special_tokens=False)
        if remainder(written, self._decoded()) is None:
            self._go_back(anchor)
        self._write(len(anchor) + most + SPARE)
        rest = remainder(written, self._decoded())
        if rest is None:
            return []
        if not self._ended and " " in rest:
            rest = rest[: rest.rindex(" ")]
        ids = self._retokenised(list(generated), written, rest)
        if self._ended and self._head.end_id is not None:
            ids.append(self._head.end_id)
        return ids[:most]

    def _decoded(self) -> str:
        return self._head.tokenizer.decode(self._text)

    def _retokenised(self, generated: list[int], written: str, rest: str) -> list[int]:
        """The rest in the language model's tokens."""
        language = self._head.language
        whole = language.encode(written + rest, add_special_tokens=False)
        if whole[: len(generated)] == generated:
            return whole[len(generated) :]
        return language.encode(rest, add_special_tokens=False)

    def _go_back(self, anchor: list[int]) -> None:
        """The text becomes ``anchor``; the graph forgets what it has read of another."""
        same = next(
            (at for at, pair in enumerate(zip(anchor, self._text, strict=False)) if pair[0] != pair[1]),
            min(len(anchor), len(self._text)),
        )
        self._read = min(self._read, same + 1, len(anchor))  # one token at least is left to be read
        kept = self._queries + self._read
        self._past = {name: array[:, :, :kept] for name, array in self._past.items()}
        self._text, self._ended = list(anchor), False

    def _write(self, count: int) -> None:
        """Goes on until the text has so many tokens, or is over."""
        spec = self._head.spec
        while len(self._text) < min(count, spec.max_positions - 1) and not self._ended:
            token = self._next()
            self._ended = token == spec.end_token_id
            if not self._ended:
                self._text.append(token)

    def _next(self) -> int:
        """Reads what is not read yet, and gives the likeliest token behind it."""
        spec = self._head.spec
        fresh = [spec.dec_token_id, *self._text][self._read :]
        steps, total = len(fresh), self._queries + self._read + len(fresh)
        outputs = self._head.session.run(
            {
                "input_ids": np.array([fresh], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "text_positions": np.arange(self._read, self._read + steps)[None],
                "logits_indices": np.array([[steps - 1]], np.int64),
                **self._past,
            }
        )
        names = zip(spec.past_names(), spec.present_names(), strict=True)
        self._past = {past: outputs[present] for past, present in names}
        self._read += steps
        return int(outputs["logits"][0, 0].argmax())


def remainder(written: str, drafted: str) -> str | None:
    """What a draft holds behind a text, or None where it does not begin with it; spaces and case do not count."""
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


CLOCKS: Mapping[str, Callable[[], float]] = {"auto": time.thread_time, "cpu": time.thread_time}
"""What tells seconds, by the backend. ONNX Runtime on the CPU computes in the thread that calls it, and in helpers
beside that: the thread's CPU time compares two of its runs whatever else the machine does. Any other backend is waited
for, by the wall clock."""


class Drafting:
    """Makes what reads ahead in a text; what it learns of the cost is shared by all texts.

    Args:
        head: The bridge's text head; None where the bundle has none, or nobody wants it.
        default: What a text gets that does not say; one of :data:`blip2edge.bundle.schema.DRAFTS`.
        close: See :data:`blip2edge.runtime.decoding.speculative.CLOSE`.
        most: The most tokens of a guess.
        clock: Gives seconds.
    """

    def __init__(
        self,
        head: DraftHead | None = None,
        default: str = "auto",
        close: float = CLOSE["fp32"],
        most: int = MOST_DRAFTED,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.head = head
        self.default = default
        self.payoffs = {kind: Payoff(clock) for kind in ("lookup", "itg")}
        self._close, self._most = close, most

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        open_graph: Callable[[str], Session],
        tokenizer: Tokenizer,
        default: DraftName,
        backend: str = "auto",
    ) -> Drafting:
        """Of a bundle.

        Args:
            bundle: An opened bundle.
            open_graph: Loads a graph by name.
            tokenizer: The language model's.
            default: What a text gets that does not say; the head is not loaded where it is ``none`` or ``lookup``.
            backend: Of the graphs; chooses one of :data:`CLOCKS`.

        Raises:
            UsageError: ``default`` is unknown, or ``itg`` where the bundle has no draft.
        """
        manifest = bundle.manifest
        head = None
        if manifest.draft is not None and DRAFT in manifest.graphs and default in ("auto", "itg"):
            ends = manifest.generation["eos_token_ids"]
            words = Tokenizer.from_file(bundle.file(DRAFT_TOKENIZER_FILE))
            head = DraftHead(open_graph(DRAFT), manifest.draft, words, tokenizer, ends[0] if ends else None)
        record = bundle.graph(DECODER)
        asked = record.spec.outputs[0].dims[1]
        most = min(MOST_DRAFTED, (asked.max if isinstance(asked, Axis) else asked) - 1)
        close = CLOSE.get(record.precision, CLOSE_QUANTISED)
        drafting = cls(head, default, close, most, CLOCKS.get(backend, time.perf_counter))
        drafting.check(GenerationOptions(draft=default))
        return drafting

    @property
    def has_head(self) -> bool:
        """Whether the bridge's text head is loaded."""
        return self.head is not None

    def check(self, options: GenerationOptions) -> None:
        """Raises UsageError where a draft is asked for by name that is not there."""
        if options.draft == "itg" and self.head is None:
            loaded = f"the captioner was loaded with draft={self.default!r}"
            raise UsageError(
                f"{option('draft')} itg: {'the bundle has no draft' if self.default in ('auto', 'itg') else loaded}",
                f"use {option('draft')} {' or '.join(kind for kind in DRAFTS if kind != 'itg')}, "
                "or export a checkpoint with draft.safetensors",
            )

    def kind(self, options: GenerationOptions) -> str:
        """Who guesses in a text: ``itg``, ``lookup`` or ``none``."""
        if options.num_beams > 1:
            return "none"
        if options.draft == "auto":
            return "itg" if self.head is not None and not options.sampling else "none"
        return options.draft

    def ahead(
        self, options: GenerationOptions, prompt_ids: Sequence[int], pictures: Mapping[str, Array], row: int
    ) -> Ahead | None:
        """What reads ahead in a text about to begin; None where nobody does.

        Args:
            options: Its own.
            prompt_ids: Of its prompt.
            pictures: The outputs of the graphs before the language model.
            row: Its row of those.
        """
        kind = self.kind(options)
        if kind == "none":
            return None
        drafter: Drafter = Lookup(prompt_ids)
        if kind == "itg" and self.head is not None:
            drafter = self.head.row(pictures, row)
        return Ahead(drafter, self.payoffs[kind], self._close, self._most)
