"""Predicts the time of vision encoder, bridge and language model in a format on a board, like ``blip2edge plan``."""

from __future__ import annotations

from collections.abc import Mapping

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import BRIDGE, DECODER, VISION
from blip2edge.calibration.formats import FP16, W8A8, GraphFormat
from blip2edge.calibration.search.choices import LANGUAGE
from blip2edge.runtime.bench.devices import Board
from blip2edge.runtime.bench.memory import element_bytes, held_precision
from blip2edge.runtime.bench.plan import HOST_S, part_cost, part_seconds, step_cost
from blip2edge.runtime.bench.roofline import reference_seconds
from blip2edge.shapes.model_shape import HeldWeights, ModelPart, ModelShape
from blip2edge.shapes.sources import bundle_shape

KINDS = {"int8": "int8-weights", "int4": "int4", W8A8: "int8"}
"""Name of each kind of number format in the time estimates of ``shapes/model_shape.py``.

For kinds that are not listed (``float``, ``fp16``), the board computes in the original format.
"""


class BoardTimer:
    """Predicts the milliseconds of each stage of a caption on a board.

    Args:
        parent: The bundle before calibration.
        board: The board.
        tokens: Length of a caption in tokens.
        prompt: Number of tokens of the prompt, without visual tokens.
    """

    def __init__(self, parent: Bundle, board: Board, tokens: int, prompt: int) -> None:
        self._shape: ModelShape = bundle_shape(parent.manifest, parent.path)
        self._board, self._steps = board, max(tokens - 1, 1)
        self._precision = parent.manifest.precision
        self._tokens = self._shape.tokens(self._shape.frames, prompt)

    @property
    def refused(self) -> list[str]:
        """Kinds of formats that are not tried: those that the board does not run, and FP16 storage.

        With FP16 storage, the weights are smaller, but a board computes in the original format.
        """
        return [FP16, *(["int8"] if "int8" in self._board.refuses else [])]

    def preprocess_ms(self) -> float:
        """Returns the milliseconds of the preprocessing of one item (a picture, or all frames of a video)."""
        seconds = self._shape.frames * reference_seconds(self._shape.image_size) + HOST_S["preprocess"]
        return self._board.host * seconds * 1e3

    def ms(self, part: str, form: GraphFormat, sizes: Mapping[str, int]) -> dict[str, float]:
        """Predicts the milliseconds of the stages of a part (vision encoder, bridge, language model).

        Args:
            part: Name of the part.
            form: The format of the part's graphs.
            sizes: Bytes of the weights of the part's graphs, by the graph's name.

        Returns:
            Milliseconds by the stage's name.
        """
        host = {stage: self._board.host * seconds for stage, seconds in HOST_S.items()}
        if part != LANGUAGE:
            stage = {VISION: "vision", BRIDGE: "bridge"}[part]
            shape = self._shape.part(part)
            seconds = 0.0
            if shape is not None:
                seconds = self._run(shape, self._weights(form, sizes[part]), self._shape.frames)
            return {stage: (host[stage] + seconds) * 1e3}
        language = [one for one in self._shape.parts if one.name not in (VISION, BRIDGE)]
        prefill = sum(self._run(one, self._weights(form, sizes[one.name])) for one in language)
        middle = {**self._tokens, "steps": 1, "context": self._tokens["context"] + 1 + self._steps // 2}
        weights, element = self._weights(form, sizes[DECODER]), element_bytes(self._precision, self._board)
        cost = step_cost(self._shape, weights, element, self._board, middle)
        step = part_seconds(self._shape.decoder, cost, weights, self._board, middle)
        return {
            "prefill": (host["prefill"] + prefill) * 1e3,
            "decode": self._steps * (host["decode"] + step) * 1e3,
        }

    def _weights(self, form: GraphFormat, size: int) -> HeldWeights:
        """Returns the size and the type of a graph's weights on the board, for a graph of ``size`` bytes."""
        return HeldWeights(KINDS.get(form.whole.kind, held_precision(self._precision, self._board)), size)

    def _run(self, part: ModelPart, weights: HeldWeights, times: int = 1) -> float:
        """Predicts the seconds that ``times`` runs of a graph take for one picture (or one video)."""
        cost = part_cost(part, weights, self._board, self._tokens, times)
        return part_seconds(part, cost, weights, self._board, self._tokens, times)
