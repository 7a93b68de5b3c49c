"""Configs of the models: sizes and variants of vision encoder, bridge and language model.

The values are checked when a config is created.

A config holds only the values that the modules need. ``from_hf`` reads these values from a section of transformers'
``config.json``, with transformers' defaults; ``to_hf`` returns such a section.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from blip2edge.bundle.schema import CrossSpec
from blip2edge.errors import CheckpointError
from blip2edge.model.config_json import Fields, Section, check_heads, check_patch_size, key
from blip2edge.model.vision.token_merging import merged_counts


class VisionEncoderConfig(Protocol):
    """Base class of the configs of vision encoders."""

    @property
    def kind(self) -> str:
        """The encoder's ``model_type``, a key in ``vision/registry.py``."""

    @property
    def image_size(self) -> int:
        """Side of the square picture that the encoder takes, in pixels."""

    @property
    def hidden_size(self) -> int:
        """Width of an output embedding."""

    @property
    def num_embeds(self) -> int:
        """Number of output embeddings of a picture."""

    @property
    def merge_tokens(self) -> int:
        """Number of patches merged in each layer; 0 for encoders that are no ViT."""

    def to_hf(self) -> dict[str, Any]:
        """Returns the encoder's section of a ``config.json``, with its ``model_type``."""


@dataclass(frozen=True)
class TransformerConfig(Section):
    """Sizes of a transformer, with BERT's defaults.

    Attributes:
        hidden_size: Width of the layers.
        intermediate_size: Width inside the feed-forward.
        activation: Activation of the feed-forward, a key of ``layers.ACTIVATIONS``.
        norm_eps: Epsilon of the norms.
    """

    hidden_size: int = key("hidden_size", 768)
    intermediate_size: int = key("intermediate_size", 3072)
    num_layers: int = key("num_hidden_layers", 12)
    num_heads: int = key("num_attention_heads", 12)
    activation: str = key("hidden_act", "gelu")
    norm_eps: float = key("layer_norm_eps", 1e-12)

    def __post_init__(self) -> None:
        check_heads(self.section, self.hidden_size, self.num_heads)


BLIP2_VISION = "blip_2_vision_model"
CLIP_VISION = "clip_vision_model"

CLIP_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""Defaults of transformers' CLIPVisionConfig where they differ from :class:`VisionConfig`."""


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """Config of a ViT with class token and pre-norm blocks; the defaults are those of transformers' Blip2VisionConfig.

    Attributes:
        qkv_bias: Whether queries, keys and values have biases.
        clip: Whether the ViT is built as OpenAI's CLIP: a norm before the blocks, patches without a bias, and class
            token and positions as ``[D]`` and ``[P, D]``. Otherwise it is built as BLIP-2's EVA-CLIP.
        post_norm: Whether there is a norm after the blocks.
        keep_class: Whether the class token stays in the output, before the patches.
        merge_tokens: Number of patches merged in each layer (``token_merging.py``). Not part of a checkpoint.
    """

    hidden_size: int = key("hidden_size", 1408)
    intermediate_size: int = key("intermediate_size", 6144)
    num_layers: int = key("num_hidden_layers", 39)
    num_heads: int = key("num_attention_heads", 16)
    norm_eps: float = key("layer_norm_eps", 1e-6)
    image_size: int = key("image_size", 224)
    patch_size: int = key("patch_size", 14)
    qkv_bias: bool = key("qkv_bias", True)
    clip: bool = False
    post_norm: bool = True
    keep_class: bool = True
    merge_tokens: int = 0

    section = "vision_config"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patch_size(self.section, self.patch_size, self.image_size)

    @property
    def kind(self) -> str:
        """The encoder's ``model_type``, a key in ``vision/registry.py``."""
        return CLIP_VISION if self.clip else BLIP2_VISION

    @property
    def num_positions(self) -> int:
        """Number of positions: one for each patch, and one for the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def num_embeds(self) -> int:
        """Number of output embeddings: the patches that remain after merging, and the class token if it is kept."""
        merged = merged_counts(self.num_positions - 1, self.num_layers, self.merge_tokens)
        return self.num_positions - sum(merged) - (not self.keep_class)

    @classmethod
    def from_clip(cls, values: Any) -> VisionConfig:
        """Reads a CLIP ``vision_config``. The result keeps all blocks of the encoder, and has no norm after them."""
        found = cls.read(values, CLIP_VISION_DEFAULTS) | {"qkv_bias": True}
        return cls(**found, clip=True, post_norm=False)

    def to_hf(self) -> dict[str, Any]:
        """Returns the section of ``config.json`` that :meth:`from_hf` reads."""
        return {"model_type": self.kind, **super().to_hf()}


@dataclass(frozen=True)
class BertSizes(TransformerConfig):
    """Sizes of BERT's blocks, with the dropout probability of training."""

    dropout: float = key("hidden_dropout_prob", 0.1)


@dataclass(frozen=True)
class QFormerConfig(BertSizes):
    """Config of a Q-Former: a BERT whose queries attend to the picture in each ``cross_attention_frequency``-th layer.

    The defaults are those of transformers' Blip2QFormerConfig.
    """

    cross_attention_frequency: int = key("cross_attention_frequency", 2)
    num_query_tokens: int = 32
    encoder_hidden_size: int = 1408

    kind = "qformer"
    section = "qformer_config"
    model_type = "blip_2_qformer"

    @property
    def num_visual_tokens(self) -> int:
        """Number of visual tokens per picture."""
        return self.num_query_tokens

    def to_hf(self) -> dict[str, Any]:
        """Returns the section of ``config.json`` that :meth:`from_hf` reads."""
        return super().to_hf() | {
            "encoder_hidden_size": self.encoder_hidden_size,
            "attention_probs_dropout_prob": self.dropout,
        }


class BridgeConfig(Protocol):
    """Base class of the configs of bridges."""

    @property
    def kind(self) -> str:
        """Name of the bridge, a key in ``bridges/registry.py``."""

    @property
    def num_visual_tokens(self) -> int:
        """Number of visual tokens per picture."""

    def to_hf(self) -> dict[str, Any]:
        """Returns the bridge's section of a ``config.json``."""


@dataclass(frozen=True)
class NoBridge:
    """Config of a model without a bridge: the decoder attends to the patches (BLIP); a picture adds no tokens."""

    kind = "none"
    num_visual_tokens = 0

    def to_hf(self) -> dict[str, Any]:
        """Returns an empty section: there is nothing to write."""
        return {}


@dataclass(frozen=True)
class LanguageConfig(Section):
    """The fields that all configs of language models share.

    Attributes:
        vocab_size: Number of tokens: rows of the token table, and logits.
        hidden_size: Width of the layers, and of the output of a bridge's projection.
        num_layers: Number of layers, each with cached keys and values.
        max_positions: Longest context in tokens: visual tokens, prompt and caption.
        tie_embeddings: Whether the head shares the weight of the token table.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    tie_embeddings: bool

    @property
    def kind(self) -> str:
        """The language model's ``model_type`` in transformers."""
        raise NotImplementedError

    @property
    def embed_dim(self) -> int:
        """Width of ``inputs_embeds``, which is the width of the token table and of the visual tokens."""
        return self.hidden_size

    @property
    def num_kv_heads(self) -> int:
        """Number of heads of the cached keys and values."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a head of the KV cache."""
        return self.hidden_size // self.num_heads

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder, which reads the prompt."""
        return False

    @property
    def cross(self) -> CrossSpec | None:
        """Sizes, mask and source of the decoder's cross-attention; None for a decoder without cross-attention."""
        return None


@dataclass(frozen=True)
class DraftConfig:
    """Config of the Q-Former's text head, as in ``draft.json``. All other sizes are those of the Q-Former.

    Attributes:
        vocab_size: Rows of the token embedding table, [DEC] included; the tokenizer is ``draft_tokenizer.json``.
        max_positions: Rows of the position table: the length of the longest text, [DEC] included.
        dec_token_id: Id of [DEC], the first token of every text.
        end_token_id: Id of the token that ends a text.
        pad_token_id: Id of the token that pads the shorter rows of a batch.
    """

    vocab_size: int
    max_positions: int
    dec_token_id: int
    end_token_id: int
    pad_token_id: int

    def __post_init__(self) -> None:
        ids = {"dec": self.dec_token_id, "end": self.end_token_id, "pad": self.pad_token_id}
        for name, token_id in ids.items():
            if not 0 <= token_id < self.vocab_size:
                raise CheckpointError(
                    f"draft.json: {name}_token_id {token_id} must be below vocab_size {self.vocab_size}"
                )

    @classmethod
    def from_json(cls, values: Any) -> DraftConfig:
        """Reads ``draft.json``.

        Raises:
            CheckpointError: A key is missing or has a wrong value.
        """
        f = Fields("draft.json", values)
        ids: dict[str, int] = {}
        for name in ("dec_token_id", "end_token_id", "pad_token_id"):
            token_id = f.token_id(name, None)
            if token_id is None:
                raise CheckpointError(f"draft.json has no {name}")
            ids[name] = token_id
        return cls(f.integer("vocab_size", None), f.integer("max_positions", None), **ids)

    def to_json(self) -> dict[str, Any]:
        """Returns the config as a JSON object for ``draft.json``."""
        return asdict(self)


LEARNED_QUERIES = ("qformer", "instructed-qformer", "perceiver", "pool")
"""Kinds of bridges with learned queries. Such a bridge can be trained so that its first m queries are enough."""


@dataclass(frozen=True)
class CaptionerConfig:
    """Config of a captioner of any family: vision encoder, bridge, language model, and special tokens.

    Attributes:
        bos_token_id: Token that begins every text after the visual tokens.
        eos_token_ids: End tokens of the language model, from ``config.json``.
        end_token_ids: Tokens that end a generated text, from ``generation_config.json``. Empty if the family does not
            use this file or if the file has no end tokens: then `eos_token_ids` end the text (:attr:`ends`).
        image_token_id: Token id that stands for a visual token in transformers' ``input_ids``; the repetition penalty
            applies to this id.
        decoder_start_token_id: First token of the decoder of an encoder-decoder model.
        family: Name of the family, a key in ``families/registry.py``.
        frames: Number of pictures per item: 1, or the frames of a video.
        draft: Config of the Q-Former's text head; None if the checkpoint has none.
        elastic: Smallest number of queries that the bridge was trained with, if each training step used only the first
            m queries, with varying m; 0 if every step used all queries.
    """

    vision: VisionEncoderConfig
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
    end_token_ids: tuple[int, ...] = ()
    elastic: int = 0

    def __post_init__(self) -> None:
        if self.elastic:
            self._check_elastic()
        if self.draft is not None and (self.bridge.kind != "qformer" or self.frames != 1):
            raise CheckpointError(
                f"the checkpoint has a draft.json and a bridge of kind {self.bridge.kind}, but a draft model needs a "
                "plain Q-Former (bridge of kind qformer, one picture)",
                "remove draft.json and draft.safetensors from the checkpoint",
            )

    def _check_elastic(self) -> None:
        most = self.bridge.num_visual_tokens
        if self.bridge.kind not in LEARNED_QUERIES:
            raise CheckpointError(
                f"config.json: elastic_queries is {self.elastic}, but the bridge is of kind {self.bridge.kind} and has "
                f"no learned queries; bridges with queries: {', '.join(LEARNED_QUERIES)}",
                "remove elastic_queries from config.json",
            )
        if not 0 < self.elastic <= most:
            raise CheckpointError(
                f"config.json: expected elastic_queries from 1 to {most}, the number of queries, got {self.elastic}"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a generated text. In training, the first of these tokens is put at the end of each text."""
        if not self.end_token_ids:
            return self.eos_token_ids
        return tuple(sorted(self.end_token_ids, key=lambda token: token not in self.eos_token_ids))

    @property
    def instruction_positions(self) -> int:
        """Length of the longest instruction that the bridge reads, in tokens; 0 if the bridge reads no instruction."""
        return int(getattr(self.bridge, "instruction_positions", 0))
