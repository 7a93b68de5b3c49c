"""Shapes of every block, validated at the door.

The dataclasses hold what the modules need and nothing else; the ``from_hf`` readers know the names and the
defaults of transformers' ``config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from blip2edge.bundle.schema import CrossSpec
from blip2edge.errors import CheckpointError
from blip2edge.model.layers import ACTIVATIONS
from blip2edge.model.vision.token_merging import merged_counts

if TYPE_CHECKING:
    from blip2edge.model.bridges.draft import DraftConfig


class Fields:
    """A section of ``config.json``, read key by key with the section named in what goes wrong."""

    def __init__(self, section: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"config.json: {section} must be an object, not {type(values).__name__}",
                "save the checkpoint again with transformers' save_pretrained",
            )
        self.section = section
        self.values: Mapping[str, Any] = values

    def integer(self, key: str, default: int | None) -> int:
        """A positive integer."""
        value = self._get(key, default)
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"config.json: {self.section}.{key} must be a positive integer, not {value!r}"
            )
        return value

    def number(self, key: str, default: float | None) -> float:
        """A finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"config.json: {self.section}.{key} must be a finite number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {self.section}.{key} must be true or false, not {value!r}")
        return value

    def activation(self, key: str, default: str) -> str:
        """The name of an activation that :data:`ACTIVATIONS` knows."""
        value = self._get(key, default)
        if value not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json: {self.section}.{key} is {value!r}, which is not one of {', '.join(sorted(ACTIVATIONS))}"
            )
        return str(value)

    def token_id(self, key: str, default: int | None) -> int | None:
        """A token id; None where there is none, which some configs write as a negative number."""
        ids = self.token_ids(key, default)
        if len(ids) > 1:
            raise CheckpointError(f"config.json: {self.section}.{key} must be one token id, not {len(ids)}")
        return ids[0] if ids else None

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self.values.get(key, default)
        ids = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise CheckpointError(f"config.json: {self.section}.{key} must be a token id, not {value!r}")
        return tuple(token for token in ids if token >= 0)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json: {self.section} has no {key}")
        return value


def check_heads(section: str, width: int, heads: int) -> None:
    """Raises CheckpointError unless ``heads`` divides ``width``."""
    if width % heads:
        raise CheckpointError(f"config.json: {section}: {heads} heads do not divide a width of {width}")


@dataclass(frozen=True)
class VisionConfig:
    """A ViT with a class token and pre-norm blocks.

    Attributes:
        qkv_bias: Queries, keys and values have biases.
        clip: As OpenAI's CLIP: a norm before the blocks, patches without a bias, and class token and positions as
            ``[D]`` and ``[P, D]``. Else EVA-CLIP as BLIP-2 holds it.
        post_norm: A norm behind the blocks.
        keep_class: The class token is handed on, before the patches.
        merge_tokens: Patches that are merged in each layer (``token_merging.py``); no checkpoint says so.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: str = "gelu"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    clip: bool = False
    post_norm: bool = True
    keep_class: bool = True
    merge_tokens: int = 0

    def __post_init__(self) -> None:
        check_heads("vision_config", self.hidden_size, self.num_heads)
        if self.patch_size > self.image_size:
            raise CheckpointError(
                f"config.json: vision_config: a patch of {self.patch_size} exceeds the picture of {self.image_size}"
            )

    @property
    def num_positions(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def num_embeds(self) -> int:
        """What is handed on: patches as far as they are not merged, and the class token where it is kept."""
        merged = merged_counts(self.num_positions - 1, self.num_layers, self.merge_tokens)
        return self.num_positions - sum(merged) - (not self.keep_class)

    @classmethod
    def from_clip(cls, values: Any) -> VisionConfig:
        """Reads a CLIP ``vision_config``; all its blocks, no norm behind them."""
        f = Fields("vision_config", values)
        return cls(
            hidden_size=f.integer("hidden_size", 768),
            intermediate_size=f.integer("intermediate_size", 3072),
            num_layers=f.integer("num_hidden_layers", 12),
            num_heads=f.integer("num_attention_heads", 12),
            image_size=f.integer("image_size", 224),
            patch_size=f.integer("patch_size", 32),
            activation=f.activation("hidden_act", "quick_gelu"),
            norm_eps=f.number("layer_norm_eps", 1e-5),
            clip=True,
            post_norm=False,
        )

    @classmethod
    def from_hf(cls, values: Any) -> VisionConfig:
        """Reads ``vision_config`` of a BLIP-2 ``config.json``."""
        f = Fields("vision_config", values)
        return cls(
            hidden_size=f.integer("hidden_size", 1408),
            intermediate_size=f.integer("intermediate_size", 6144),
            num_layers=f.integer("num_hidden_layers", 39),
            num_heads=f.integer("num_attention_heads", 16),
            image_size=f.integer("image_size", 224),
            patch_size=f.integer("patch_size", 14),
            activation=f.activation("hidden_act", "gelu"),
            norm_eps=f.number("layer_norm_eps", 1e-6),
            qkv_bias=f.flag("qkv_bias", True),
        )

    def to_hf(self) -> dict[str, Any]:
        """The section that :meth:`from_hf` reads."""
        return {
            "model_type": "clip_vision_model" if self.clip else "blip_2_vision_model",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_act": self.activation,
            "layer_norm_eps": self.norm_eps,
            "qkv_bias": self.qkv_bias,
        }


@dataclass(frozen=True)
class QFormerConfig:
    """A BERT whose queries also attend to the picture, in every ``cross_attention_frequency``-th layer."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_query_tokens: int
    encoder_hidden_size: int
    cross_attention_frequency: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1

    kind = "qformer"

    @property
    def num_visual_tokens(self) -> int:
        """How many tokens a picture becomes."""
        return self.num_query_tokens

    def __post_init__(self) -> None:
        check_heads("qformer_config", self.hidden_size, self.num_heads)

    @classmethod
    def from_hf(cls, values: Any, *, num_query_tokens: int, encoder_hidden_size: int) -> QFormerConfig:
        """Reads ``qformer_config`` of a BLIP-2 ``config.json``."""
        f = Fields("qformer_config", values)
        return cls(
            hidden_size=f.integer("hidden_size", 768),
            intermediate_size=f.integer("intermediate_size", 3072),
            num_layers=f.integer("num_hidden_layers", 12),
            num_heads=f.integer("num_attention_heads", 12),
            num_query_tokens=num_query_tokens,
            encoder_hidden_size=encoder_hidden_size,
            cross_attention_frequency=f.integer("cross_attention_frequency", 2),
            activation=f.activation("hidden_act", "gelu"),
            norm_eps=f.number("layer_norm_eps", 1e-12),
            dropout=f.number("hidden_dropout_prob", 0.1),
        )

    def to_hf(self) -> dict[str, Any]:
        """The section that :meth:`from_hf` reads."""
        return {
            "model_type": "blip_2_qformer",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "encoder_hidden_size": self.encoder_hidden_size,
            "cross_attention_frequency": self.cross_attention_frequency,
            "hidden_act": self.activation,
            "layer_norm_eps": self.norm_eps,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
        }


class BridgeConfig(Protocol):
    """What the rest of the project asks of any bridge's config."""

    @property
    def kind(self) -> str:
        """The row of ``bridges.py``."""

    @property
    def num_visual_tokens(self) -> int:
        """How many tokens a picture becomes."""

    def to_hf(self) -> dict[str, Any]:
        """Its section of a ``config.json``."""


@dataclass(frozen=True)
class NoBridge:
    """The decoder looks at the patches themselves (BLIP); a picture takes no slots among the text's."""

    kind = "none"
    num_visual_tokens = 0

    def to_hf(self) -> dict[str, Any]:
        """Nothing to write."""
        return {}


class LanguageConfig(Protocol):
    """What the rest of the project asks of any language model's config."""

    @property
    def kind(self) -> str:
        """transformers' ``model_type``."""

    @property
    def vocab_size(self) -> int:
        """Rows of the token table, and logits."""

    @property
    def hidden_size(self) -> int:
        """Width inside, and of a bridge's projection."""

    @property
    def embed_dim(self) -> int:
        """Width of ``inputs_embeds``: of the token table and of the visual tokens."""

    @property
    def num_layers(self) -> int:
        """Layers, and so pairs of cached keys and values."""

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cached keys and values."""

    @property
    def head_dim(self) -> int:
        """Width of a head of the cache."""

    @property
    def max_positions(self) -> int:
        """Longest context: visual tokens, prompt and caption."""

    @property
    def tie_embeddings(self) -> bool:
        """Whether the head is the token table."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the prompt goes to an encoder."""

    @property
    def cross(self) -> CrossSpec | None:
        """What the decoder looks at beside its own text."""

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` of a ``config.json``."""


@dataclass(frozen=True)
class CaptionerConfig:
    """A captioner of any family: its three parts and its special tokens.

    Attributes:
        bos_token_id: Begins every text after the visual tokens.
        eos_token_ids: Any of them ends a caption.
        image_token_id: Stands for a visual token in transformers' ``input_ids``; the repetition penalty sees it.
        decoder_start_token_id: What the decoder of an encoder-decoder model begins with.
        family: Its row of ``families.py``.
        frames: Pictures an item: 1, or the frames of a video.
        draft: The text head of its Q-Former, where the checkpoint has one.
    """

    vision: VisionConfig
    bridge: BridgeConfig
    language: LanguageConfig
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    image_token_id: int | None = None
    decoder_start_token_id: int | None = None
    family: str = "blip-2"
    frames: int = 1
    draft: DraftConfig | None = None

    def __post_init__(self) -> None:
        if self.draft is not None and (self.bridge.kind != "qformer" or self.frames != 1):
            raise CheckpointError(
                f"draft.json is beside a checkpoint whose bridge is {self.bridge.kind}, but only the text head of a "
                "plain Q-Former can draft",
                "remove draft.json and draft.safetensors from the checkpoint",
            )

    @property
    def instruction_positions(self) -> int:
        """The longest instruction that enters the bridge; 0 where none does."""
        return int(getattr(self.bridge, "instruction_positions", 0))
