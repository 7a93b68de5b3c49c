"""Predicts the time of a part in a format on a board, by the arithmetic of ``blip2edge plan``."""

from __future__ import annotations

from collections.abc import Mapping

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import BRIDGE, DECODER, VISION
from blip2edge.calibration.formats import FLOAT, FP16, W8A8, GraphFormat
from blip2edge.calibration.search.choices import LANGUAGE
from blip2edge.runtime.bench.devices import Board
from blip2edge.runtime.bench.plan import HOST_S, effective, operators
from blip2edge.runtime.bench.roofline import reference_seconds
from blip2edge.shapes.cost import StageCost
from blip2edge.shapes.model_shape import ModelPart, ModelShape, TokenCounts
from blip2edge.shapes.sources import bundle_shape

KINDS = {"int8": "int8-weights", "int4": "int4", W8A8: "int8"}
"""Formats of a board's rates (``FORMATS``) by the kind of a number format; the other kinds have the parent's."""


class BoardTimer:
    """Predicts milliseconds of stages on a board.

    Args:
        parent: The parent bundle.
        board: The board.
        tokens: Length of a caption in tokens.
        prompt: Tokens of the prompt, without visual tokens.
    """

    def __init__(self, parent: Bundle, board: Board, tokens: int, prompt: int) -> None:
        self._shape: ModelShape = bundle_shape(parent.manifest, parent.path)
        self._board, self._steps = board, max(tokens - 1, 1)
        self._precision = parent.manifest.precision
        self._tokens = self._shape.tokens(self._shape.frames, prompt)

    @property
    def refused(self) -> list[str]:
        """Kinds of formats that the board does not run; FP16 storage is computed as the parent there."""
        return [FP16, *(["int8"] if "int8" in self._board.refuses else [])]

    def preprocess_ms(self) -> float:
        """Milliseconds of the preprocessing of an item."""
        seconds = self._shape.frames * reference_seconds(self._shape.image_size) + HOST_S["preprocess"]
        return self._board.host * seconds * 1e3

    def ms(self, part: str, form: GraphFormat, sizes: Mapping[str, int]) -> dict[str, float]:
        """Predicts the milliseconds of the stages of a part.

        Args:
            part: Name of the part.
            form: The format of its graphs.
            sizes: Bytes of its graphs' weights, by the graph's name.
        """
        host = {stage: self._board.host * seconds for stage, seconds in HOST_S.items()}
        if part != LANGUAGE:
            stage = {VISION: "vision", BRIDGE: "bridge"}[part]
            shape = self._shape.part(part)
            frames = self._shape.frames
            seconds = 0.0 if shape is None else self._run(shape, form, sizes[part], self._tokens, frames)
            return {stage: (host[stage] + seconds) * 1e3}
        language = [one for one in self._shape.parts if one.name not in (VISION, BRIDGE)]
        prefill = sum(self._run(one, form, sizes[one.name], self._tokens) for one in language)
        middle = {**self._tokens, "steps": 1, "context": self._tokens["context"] + 1 + self._steps // 2}
        element = 4 if self._precision == "fp32" else 2
        cache = self._shape.cache.bytes(middle["context"], middle["source"], element)
        read = cache * self._board.efficiency.cache_passes
        step = self._run(self._shape.decoder, form, sizes[DECODER], middle, extra=read)
        return {
            "prefill": (host["prefill"] + prefill) * 1e3,
            "decode": self._steps * (host["decode"] + step) * 1e3,
        }

    def _run(
        self, part: ModelPart, form: GraphFormat, size: int, tokens: TokenCounts, times: int = 1, extra: float = 0.0
    ) -> float:
        """Seconds of a run of a graph: products and bytes by the roofline, and the operators between them."""
        share = self._board.efficiency
        products = times * sum(matrix.operations(tokens, share.extra_rows, share.overlaps) for matrix in part.matrices)
        scores = times * sum(attention.operations(tokens) for attention in part.attentions)
        floating = form.whole.kind in (FLOAT, FP16)
        cost = StageCost(scores + products, 0.0, size) if floating else StageCost(scores, products, size)
        kind = KINDS.get(form.whole.kind, self._precision)
        cost += StageCost(0.0, 0.0, extra)
        seconds = cost.seconds(effective(self._board, kind, cost.bytes), overlaps=share.overlaps)
        calls = operators(part, self._precision if floating else form.whole.kind, self._board) * share.call_s
        return seconds + times * part.elements(tokens) * share.element_s + calls
