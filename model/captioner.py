"""The whole captioner in torch: what is trained, what is exported, and the reference that parity is held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.errors import UnsupportedModelError
from blip2edge.model import weights
from blip2edge.model.config import Fields, LanguageConfig, QFormerConfig, VisionConfig
from blip2edge.model.language import LANGUAGES, language_of
from blip2edge.model.qformer import QFormerBridge
from blip2edge.model.vit import VisionTransformer
from blip2edge.model.weights import WeightMap

MODEL_TYPES = ("blip-2",)
"""``model_type`` of the checkpoints that this version reads."""


@dataclass(frozen=True)
class CaptionerConfig:
    """A BLIP-2 captioner.

    Attributes:
        bos_token_id: Begins every text after the visual tokens.
        eos_token_ids: Any of them ends a caption.
        image_token_id: Stands for a visual token in transformers' ``input_ids``; the repetition penalty sees it.
    """

    vision: VisionConfig
    qformer: QFormerConfig
    language: LanguageConfig
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = 1
    image_token_id: int | None = None
    family: str = "blip-2"

    @classmethod
    def from_hf(cls, config: Any) -> CaptionerConfig:
        """Reads the ``config.json`` of a ``Blip2ForConditionalGeneration``.

        Raises:
            UnsupportedModelError: Another ``model_type``, or a language model without a row.
            CheckpointError: A key is missing or has a wrong value.
        """
        f = Fields("the top level", config)
        model_type = f.values.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"the checkpoint's model_type is {model_type!r}, which is not supported",
                f"supported: {', '.join(MODEL_TYPES)} with a language model of type {', '.join(sorted(LANGUAGES))}",
            )
        vision = VisionConfig.from_hf(f.values.get("vision_config", {}))
        qformer = QFormerConfig.from_hf(
            f.values.get("qformer_config", {}),
            num_query_tokens=f.integer("num_query_tokens", 32),
            encoder_hidden_size=vision.hidden_size,
        )
        text = Fields("text_config", f.values.get("text_config", {}))
        eos = text.values.get("eos_token_id", 2)
        return cls(
            vision=vision,
            qformer=qformer,
            language=language_of(text.values.get("model_type", "opt")).read_config(text.values),
            bos_token_id=text.token_id("bos_token_id", 2),
            eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else (() if eos is None else (eos,)),
            pad_token_id=text.token_id("pad_token_id", 1),
            image_token_id=f.token_id("image_token_id", None) or f.token_id("image_token_index", None),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that :meth:`from_hf` and transformers read."""
        eos: int | list[int] | None = list(self.eos_token_ids)
        if len(self.eos_token_ids) < 2:
            eos = self.eos_token_ids[0] if self.eos_token_ids else None
        text = {
            **self.language.to_hf(),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        }
        return {
            "model_type": "blip-2",
            "architectures": ["Blip2ForConditionalGeneration"],
            "num_query_tokens": self.qformer.num_query_tokens,
            "image_token_index": self.image_token_id,
            "tie_word_embeddings": self.language.tie_embeddings,
            "use_decoder_only_language_model": True,
            "vision_config": self.vision.to_hf(),
            "qformer_config": self.qformer.to_hf(),
            "text_config": text,
        }

    @property
    def weight_map(self) -> WeightMap:
        """Our parameters and transformers' tensors."""
        rules = weights.under("language.", "language_model.", language_of(self.language.kind).rules)
        left_out = [r"vision_model\.embeddings\.position_ids", r"qformer\.embeddings\.position_ids"]
        if self.language.tie_embeddings:
            (head,) = WeightMap(rules).sources("language.head")
            (table,) = WeightMap(rules).sources("language.embed_tokens")
            left_out.append(head.replace(".", r"\.") + r"\.weight")
            rules = (*(rule for rule in rules if rule.ours != "language.head"), weights.Rule("language.head", table))
        return WeightMap((*weights.BLIP2, *rules), left_out)


class CaptionerModel(nn.Module):
    """Vision encoder, bridge and language model."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.bridge = QFormerBridge(config.qformer, config.language.hidden_size, config.language.embed_dim)
        self.language = language_of(config.language.kind).build(config.language)

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """``pixel_values [B, 3, H, W]`` to ``[B, Q, D]``."""
        return self.bridge(self.vision(pixel_values))  # type: ignore[no-any-return]

    def forward(self, visual_tokens: Tensor, token_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Logits of a text behind its visual tokens (teacher forcing).

        Args:
            visual_tokens: ``[B, Q, D]``.
            token_ids: int64 ``[B, S]``, from the BOS on.
            token_mask: int64 ``[B, S]``, 1 where a token is valid; None for all.

        Returns:
            ``[B, S, V]``: logits after each token of the text.
        """
        batch, queries = visual_tokens.shape[:2]
        embeds = torch.cat([visual_tokens, self.language.embed(token_ids)], dim=1)
        text = torch.ones_like(token_ids) if token_mask is None else token_mask
        mask = torch.cat([text.new_ones(batch, queries), text], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        asked = torch.arange(queries, embeds.shape[1], device=embeds.device).expand(batch, -1)
        logits, _ = self.language(embeds, mask, positions, asked)
        return logits  # type: ignore[no-any-return]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every parameter's name and shape; works on the meta device too."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
