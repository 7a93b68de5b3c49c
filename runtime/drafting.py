"""Who drafts for a captioner, and for which of its texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from blip2edge.contract import DECODER, DRAFT, DRAFT_TOKENIZER_FILE, DRAFTS, Axis
from blip2edge.errors import UsageError
from blip2edge.manifest import Bundle
from blip2edge.runtime.draft import DraftHead
from blip2edge.runtime.options import GenerationOptions
from blip2edge.runtime.session import Array, Session
from blip2edge.runtime.speculate import CLOSE, CLOSE_QUANTISED, MOST_DRAFTED, Ahead, Drafter, Lookup, Payoff
from blip2edge.runtime.tokenizer import Tokenizer

CLOCKS: Mapping[str, Callable[[], float]] = {"auto": time.thread_time, "cpu": time.thread_time}
"""What tells seconds, by the backend. ONNX Runtime on the CPU computes in the thread that calls it, and in helpers
beside that: the thread's CPU time compares two of its runs whatever else the machine does. Any other backend is waited
for, by the wall clock."""


class Drafting:
    """Makes what reads ahead in a text; what it learns of the cost is shared by all texts.

    Args:
        head: The bridge's text head; None where the bundle has none, or nobody wants it.
        default: What a text gets that does not say; one of :data:`blip2edge.contract.DRAFTS`.
        close: See :data:`blip2edge.runtime.speculate.CLOSE`.
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
        default: str,
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
                f"--draft itg: {'the bundle has no draft' if self.default in ('auto', 'itg') else loaded}",
                f"use --draft {' or '.join(kind for kind in DRAFTS if kind != 'itg')}, or export a checkpoint with "
                "draft.safetensors",
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
