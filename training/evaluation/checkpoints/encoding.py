"""Encodes pictures and prompts with a checkpoint in torch; pictures and prompts are prepared by the runtime's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from blip2edge.bundle.schema import QUERY_IDS, ElasticSpec
from blip2edge.model.captioner import CaptionerModel
from blip2edge.runtime.captioning.encoder import EncodedBatch, Encoder, ImageParts, StageClock, TextParts
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import PromptText


class ModuleGraph:
    """Runs a torch module in place of a loaded graph (:class:`blip2edge.runtime.backends.base.Session`).

    Floating-point inputs are converted to the dtype of the module's weights. Outputs are on the device of the module.

    Args:
        module: The module, in eval mode.
        output: Name of the module's output.
    """

    input_names: tuple[str, ...] = ()

    def __init__(self, module: nn.Module, output: str) -> None:
        self._module = module
        self.output_names = (output,)

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs the module; ``inputs`` are arrays or tensors in the order of the module's arguments."""
        del outputs
        given = {name: torch.as_tensor(value) for name, value in inputs.items()}
        weight = next(self._module.parameters(), next(iter(given.values())))  # BLIP's bridge has no weights
        given = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in given.items()
        }
        named = {QUERY_IDS: given.pop(QUERY_IDS)} if QUERY_IDS in given else {}
        return {self.output_names[0]: self._module(*given.values(), **named)}

    def close(self) -> None:
        """Does nothing: the caller owns the module."""


class TorchEncoder(Encoder):
    """Encodes pictures and prompts with a model's own modules; the batch holds tensors in place of arrays.

    Args:
        model: The model in eval mode; its weights and its device may change between two calls.
        preprocessing: Preprocessing of the pictures.
        text: Tokenizers and prompt template.
    """

    def __init__(self, model: CaptionerModel, preprocessing: Preprocessing, text: TextParts) -> None:
        config = model.config
        elastic = ElasticSpec(config.elastic, config.bridge.num_visual_tokens) if config.elastic else None
        parts: tuple[Any, Any] = ModuleGraph(model.vision, "image_embeds"), ModuleGraph(model.bridge, "visual_tokens")
        super().__init__(ImageParts(preprocessing, np.dtype(np.float32), *parts, elastic=elastic), text)

    def __call__(
        self,
        images: Sequence[ItemSource],
        texts: Sequence[PromptText | None],
        clock: StageClock,
        queries: int | None = None,
    ) -> EncodedBatch:
        """Encodes pictures and prompts in torch, with the arguments of the runtime's :class:`Encoder`.

        Args:
            images: One item for each row: a picture, or a list of pictures.
            texts: The prompt of each row; None for the default prompt.
            clock: Measures the stages.
            queries: Number of visual tokens of each picture, for an elastic bridge; None for all.

        Returns:
            The prompts, the outputs of picture encoder and bridge as tensors, and the number of pictures in each row.
        """
        batch = self.prepare(images, texts, clock, queries)
        found: Mapping[str, Any] = self.run_bridge(self.run_vision(batch.pixels, clock), batch.bridge_inputs, clock)
        if max(batch.counts) > 1:
            found = {name: _packed(tensor, batch.counts) for name, tensor in found.items()}
        return EncodedBatch(batch.prompts, dict(found), batch.counts)


def _packed(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """Concatenates the visual tokens of each row's pictures, with zeros at the end.

    Maps ``[N, Q, D]``, all N pictures, to ``[B, max(counts) * Q, D]``; ``counts`` are the pictures of each row.
    """
    return pad_sequence(list(torch.split(tensor, list(counts))), batch_first=True).flatten(1, 2)
