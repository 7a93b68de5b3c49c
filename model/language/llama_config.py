"""Configs of Llama and similar models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.model.config import LanguageConfig
from blip2edge.model.config_json import Fields, key

if TYPE_CHECKING:
    from typing_extensions import Self

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotary positions.

    Attributes:
        theta: Base of the wavelengths.
        kind: How frequencies are scaled, one of :data:`ROPE_KINDS`: not at all, all divided by ``factor``, or (Llama
            3.1) only low frequencies.
        factor: Divisor of the frequencies.
        low_freq_factor: Llama 3.1: wavelengths above ``original_positions / low_freq_factor`` are scaled.
        high_freq_factor: Llama 3.1: wavelengths below ``original_positions / high_freq_factor`` are not scaled.
        original_positions: Context length in tokens that the model was first trained with.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], max_positions: int) -> RopeConfig:
        """Reads ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (older versions).

        Raises:
            UnsupportedModelError: This kind of scaling is not supported.
        """
        f = Fields("rope_parameters", values.get("rope_parameters") or values.get("rope_scaling") or {})
        kind = f.values.get("rope_type", f.values.get("type", "default"))
        partial = f.values.get("partial_rotary_factor", values.get("partial_rotary_factor"))
        if kind not in ROPE_KINDS or partial not in (None, 1, 1.0):
            what = f"of kind {kind!r}" if kind not in ROPE_KINDS else "over a part of each head"
            raise UnsupportedModelError(
                f"the language model has rotary positions {what}, which are not supported",
                f"supported: {', '.join(ROPE_KINDS)}, applied to whole heads",
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
        """Returns the ``rope_parameters`` that :meth:`from_hf` reads."""
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


@dataclass(frozen=True)
class LlamaConfig(LanguageConfig):
    """Config of Llama and similar models; the defaults are Llama's, :data:`DEFAULTS` has those of the other models.

    Attributes:
        qkv_bias: Whether queries, keys and values have biases (Qwen2).
        out_bias: Whether the matrix after the heads has a bias.
        mlp_bias: Whether the three matrices of the feed-forward have biases.
        qk_norm: Whether each head's queries and keys are normed before the rotation (Qwen3).
        window: Number of tokens that a token attends to, itself included (Mistral 0.1, Qwen2); None for all.
        window_layers: Indices of the layers that use the window.
        kind: transformers' ``model_type``, a key of :data:`DEFAULTS`.
    """

    vocab_size: int = key("vocab_size", 32000)
    hidden_size: int = key("hidden_size", 4096)
    ffn_dim: int = key("intermediate_size", 11008)
    num_layers: int = key("num_hidden_layers", 32)
    num_heads: int = key("num_attention_heads", 32)
    num_kv_heads: int = 32
    head_dim: int = 128
    max_positions: int = key("max_position_embeddings", 2048)
    activation: str = key("hidden_act", "silu")
    norm_eps: float = key("rms_norm_eps", 1e-6)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = key("tie_word_embeddings", False)
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    rope: RopeConfig = field(default_factory=RopeConfig)
    kind: str = "llama"

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

    def window_of(self, layer: int) -> int | None:
        """Returns the window of one layer in tokens; None if the layer attends to all tokens."""
        return self.window if layer in self.window_layers else None

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> Self:
        """Reads a ``config.json`` or ``text_config`` of Llama or a similar model, with that model's defaults."""
        f = Fields(cls.section, values)
        kind = str(f.values.get("model_type", "llama"))
        sizes = DEFAULTS[kind]
        found = cls.read(values, sizes)
        heads = found["num_heads"]
        bias = kind in ("llama", "qwen3") and f.flag("attention_bias", False)
        window, window_layers = _window(kind, f, found["num_layers"])
        own = {
            "num_kv_heads": _kv_heads(f, heads, sizes),
            "head_dim": f.integer("head_dim", sizes.get("head_dim", found["hidden_size"] // heads)),
            "qkv_bias": bias or kind == "qwen2",
            "out_bias": bias,
            "mlp_bias": kind == "llama" and f.flag("mlp_bias", False),
            "qk_norm": kind == "qwen3",
            "window": window,
            "window_layers": window_layers,
            "rope": RopeConfig.from_hf(f.values, found["max_positions"]),
            "kind": kind,
        }
        return cls(**found | own | given)

    def to_hf(self) -> dict[str, Any]:
        """Returns the ``text_config`` that :meth:`from_hf` reads."""
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
            **super().to_hf(),
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_parameters": self.rope.to_hf(),
            **own[self.kind],
        }


_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}
"""Defaults of transformers' configs where they differ from :class:`LlamaConfig`."""


def _kv_heads(f: Fields, heads: int, sizes: Mapping[str, int]) -> int:
    """Reads the number of key/value heads.

    As in transformers, a missing key has the default of the config class. With null, there are as many key/value heads
    as query heads.
    """
    if "num_key_value_heads" in f.values:
        return f.integer("num_key_value_heads", heads)
    return sizes.get("num_key_value_heads", heads)


def _window(kind: str, f: Fields, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Returns the sliding window in tokens (None for no window), and the indices of the layers with this window."""
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
