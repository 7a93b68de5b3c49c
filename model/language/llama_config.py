"""Configs of Llama and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blip2edge.bundle.schema import CrossSpec
from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.model.config_json import Fields, Key, write_keys

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotary positions.

    Attributes:
        theta: Base of the wavelengths.
        kind: One of :data:`ROPE_KINDS`: unchanged, all divided by ``factor``, or (Llama 3.1) only the low ones.
        factor: Divisor of the frequencies.
        low_freq_factor: Llama 3.1: wavelengths above ``original_positions / low_freq_factor`` are scaled.
        high_freq_factor: Llama 3.1: wavelengths below ``original_positions / high_freq_factor`` are not scaled.
        original_positions: Context that the model was first trained with.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], max_positions: int) -> RopeConfig:
        """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

        Raises:
            UnsupportedModelError: The kind is not supported.
        """
        f = Fields("rope_parameters", values.get("rope_parameters") or values.get("rope_scaling") or {})
        kind = f.values.get("rope_type", f.values.get("type", "default"))
        partial = f.values.get("partial_rotary_factor", values.get("partial_rotary_factor"))
        if kind not in ROPE_KINDS or partial not in (None, 1, 1.0):
            what = f"of kind {kind!r}" if kind not in ROPE_KINDS else "over a part of each head"
            raise UnsupportedModelError(
                f"the language model has rotary positions {what}, which are not supported",
                f"supported: {', '.join(ROPE_KINDS)}, over whole heads",
            )
        theta = f.number("rope_theta", Fields("text_config", values).number("rope_theta", 10_000.0))
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, f.number("factor", None))
        return cls(
            theta,
            kind,
            f.number("factor", None),
            f.number("low_freq_factor", None),
            f.number("high_freq_factor", None),
            f.integer("original_max_position_embeddings", max_positions),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``rope_parameters`` that :meth:`from_hf` reads."""
        found: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            found["factor"] = self.factor
        if self.kind == "llama3":
            found |= {
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": self.original_positions,
            }
        return found


LLAMA_KEYS = (
    Key("vocab_size", "vocab_size", "integer"),
    Key("hidden_size", "hidden_size", "integer", 4096),
    Key("ffn_dim", "intermediate_size", "integer"),
    Key("num_layers", "num_hidden_layers", "integer", 32),
    Key("num_heads", "num_attention_heads", "integer", 32),
    Key("max_positions", "max_position_embeddings", "integer"),
    Key("activation", "hidden_act", "activation", "silu"),
    Key("norm_eps", "rms_norm_eps", "number", 1e-6),
    Key("tie_embeddings", "tie_word_embeddings", "flag", False),
)
"""``text_config`` of Llama and its relatives; :data:`DEFAULTS` has the sizes that differ between them."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and variants.

    Attributes:
        qkv_bias: Queries, keys and values have biases (Qwen2).
        out_bias: The matrix after the heads has a bias.
        mlp_bias: The three matrices of the feed-forward have biases.
        qk_norm: Each head's queries and keys are normed before the rotation (Qwen3).
        window: A token attends to this many tokens, itself included; None for all (Mistral 0.1, Qwen2).
        window_layers: Layers with the window.
        kind: transformers' ``model_type``, a key of :data:`DEFAULTS`.
    """

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    activation: str = "silu"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    rope: RopeConfig = field(default_factory=RopeConfig)
    kind: str = "llama"

    is_encoder_decoder = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: text_config: {self.num_kv_heads} heads of keys do not divide {self.num_heads} heads "
                "of queries"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"config.json: text_config: rotary positions need an even head_dim, not {self.head_dim}"
            )

    @property
    def embed_dim(self) -> int:
        """Width of the token table."""
        return self.hidden_size

    @property
    def cross(self) -> CrossSpec | None:
        """None: it has no cross-attention."""
        return None

    def window_of(self, layer: int) -> int | None:
        """The window of one layer."""
        return self.window if layer in self.window_layers else None

    @classmethod
    def from_hf(cls, values: Any) -> LlamaConfig:
        """Reads a ``config.json`` or ``text_config`` of Llama or a relative, with its own defaults."""
        f = Fields("text_config", values)
        kind = str(f.values.get("model_type", "llama"))
        sizes = DEFAULTS[kind]
        found = f.read(LLAMA_KEYS, sizes)
        heads, longest = found["num_heads"], found["max_positions"]
        bias = kind in ("llama", "qwen3") and f.flag("attention_bias", False)
        window, window_layers = _window(kind, f, found["num_layers"])
        return cls(
            **found,
            num_kv_heads=_kv_heads(f, heads, sizes),
            head_dim=f.integer("head_dim", sizes.get("head_dim", found["hidden_size"] // heads)),
            qkv_bias=bias or kind == "qwen2",
            out_bias=bias,
            mlp_bias=kind == "llama" and f.flag("mlp_bias", False),
            qk_norm=kind == "qwen3",
            window=window,
            window_layers=window_layers,
            rope=RopeConfig.from_hf(f.values, longest),
            kind=kind,
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` that :meth:`from_hf` reads."""
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        qwen = {
            "use_sliding_window": self.window is not None,
            "sliding_window": self.window,
            "layer_types": [
                "sliding_attention" if layer in self.window_layers else "full_attention"
                for layer in range(self.num_layers)
            ],
        }
        own: dict[str, dict[str, Any]] = {
            "llama": {"attention_bias": self.out_bias, "mlp_bias": self.mlp_bias},
            "mistral": {"sliding_window": self.window},
            "qwen2": qwen,
            "qwen3": {**qwen, "attention_bias": self.out_bias},
        }
        return {
            "model_type": self.kind,
            "architectures": [f"{names[self.kind]}ForCausalLM"],
            **write_keys(self, LLAMA_KEYS),
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_parameters": self.rope.to_hf(),
            **own[self.kind],
        }


DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}
"""Defaults of transformers' configs."""


def _kv_heads(f: Fields, heads: int, sizes: Mapping[str, int]) -> int:
    """A missing key gives the class's default, null gives one per head; as in transformers."""
    if "num_key_value_heads" in f.values:
        return f.integer("num_key_value_heads", heads)
    return sizes.get("num_key_value_heads", heads)


def _window(kind: str, f: Fields, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, and the layers that have it."""
    used = kind == "mistral" or (kind in ("qwen2", "qwen3") and f.flag("use_sliding_window", False))
    if not used or f.values.get("sliding_window", 4096) is None:
        return None, ()
    window = f.integer("sliding_window", 4096)
    if kind == "mistral":
        return window, tuple(range(layers))
    types = f.values.get("layer_types")
    if types is None:
        return window, tuple(range(f.integer("max_window_layers", 28), layers))
    return window, tuple(layer for layer, name in enumerate(types) if name == "sliding_attention")
