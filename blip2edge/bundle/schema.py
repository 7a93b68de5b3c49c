"""The schema of a bundle: its tensors, graphs and caches as data, and the names of its files.

The exporter, ``build`` (optimization profiles) and the runtime all read a graph's tensors and axes from it.
Only the standard library is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

VISION = "vision_encoder"
BRIDGE = "bridge"
DECODER = "decoder"
TEXT_ENCODER = "text_encoder"
CROSS_KV = "cross_kv"
IMAGE_FEATURES = "image_features"
TEXT_EMBEDS = "text_embeds"
MATCH = "match"
DRAFT = "draft"
QUERIES = "queries"
"""First part of the names ``queries.{i}.{key,value}``: outputs of the bridge with the keys and values of the query
tokens in layer i, ``[B, H, Q, d]``. The KV cache of the draft model begins with them."""

INSTRUCTION = ("instruction_ids", "instruction_mask")
"""Inputs of a bridge that reads an instruction: int64 ``[B, T]``, padded on the right."""

QUERY_IDS = "query_ids"
"""Input of an elastic bridge, whose number of queries can be chosen: the numbers 0 to Q - 1 in each row, for Q queries,
int64 ``[B, Q]``."""

EMBEDDINGS_FILE = "embed_tokens.safetensors"
EMBEDDINGS_TENSOR = "embed_tokens"
TOKENIZER_FILE = "tokenizer.json"
QFORMER_TOKENIZER_FILE = "qformer_tokenizer.json"
DRAFT_TOKENIZER_FILE = "draft_tokenizer.json"

DERIVED: Mapping[str, str] = {"optimized": "optimized.json", "engines": "engine.json"}
"""Directories of a bundle for files that are made from it, each with the name of its record.

Each folder in such a directory (a backend's copy, or the engines of one GPU) has this record, which lists its files.
"""

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "bool")


SCORES = ("logits", "match_logits", "probability")
"""Outputs that stay float32 in every precision, for sampling and ranking."""


CROSS_MASK = "cross_attention_mask"
CROSS_MASKS = ("none", "keys", "steps")
"""Kinds of masks of a decoder's cross-attention.

- ``none``: there is no mask, because all keys are valid.
- ``keys``: int64 ``[B, E]``, 1 for a valid key.
- ``steps``: int64 ``[B, S, E]``, 1 for a key that the token attends to. A token that attends to no key gets zeros.
"""


DraftName = Literal["auto", "none", "lookup", "itg"]
DRAFTS: tuple[DraftName, ...] = get_args(DraftName)
"""Draft models of speculative decoding.

``lookup`` is prompt lookup, which searches n-grams in the prompt and in the text so far. ``itg`` is the text head of
the Q-Former. ``auto`` is ``itg`` if the bundle has this head and decoding is greedy, else ``none``.
"""

BackendName = Literal["auto", "cpu", "openvino", "cuda", "cuda-decoder", "tensorrt", "rtx", "ort-tensorrt"]
"""Names of the backends. ``auto`` is TensorRT or RTX if the bundle has engines for this GPU, otherwise ``cuda`` if it
works on this machine, otherwise ``cpu``."""


@dataclass(frozen=True)
class Axis:
    """A dynamic dimension, with the range of lengths that engines are built and exports are checked for.

    ``name`` can be a sum of two elementary axes (``past + steps``); the range is then the sum of their ranges.
    """

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"axis {self.name}: {self.min} <= {self.opt} <= {self.max} does not hold")

    def __add__(self, other: Axis) -> Axis:
        return Axis(f"{self.name} + {other.name}", self.min + other.min, self.opt + other.opt, self.max + other.max)

    def value(self, sizes: Mapping[str, int]) -> int:
        """Returns the length of this axis.

        Args:
            sizes: Length of each elementary axis (an axis that is no sum), by its name.
        """
        return sum(sizes[part] for part in self.name.split(" + "))


Dim = int | Axis


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and dimensions of an input or output of a graph."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor {self.name}: dtype {self.dtype} is not one of {', '.join(DTYPES)}")

    @property
    def width(self) -> int:
        """Length of the tensor's last dimension.

        Raises:
            ValueError: The last dimension is dynamic.
        """
        last = self.dims[-1]
        if isinstance(last, Axis):
            raise ValueError(f"tensor {self.name}: its last dimension varies ({last.name})")
        return last

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the tensor's shape as numbers.

        Args:
            sizes: Length of each elementary axis (an axis that is no sum), by its name.
        """
        return tuple(dim if isinstance(dim, int) else dim.value(sizes) for dim in self.dims)

    def to_json(self) -> dict[str, Any]:
        """Returns the spec as a JSON object for ``bundle.json``."""
        axes: list[dict[str, Any]] = []
        for dim in self.dims:
            if isinstance(dim, int):
                axes.append({"size": dim})
            else:
                axes.append({"name": dim.name, "min": dim.min, "opt": dim.opt, "max": dim.max})
        return {"name": self.name, "dtype": self.dtype, "axes": axes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TensorSpec:
        """Reads a spec from the JSON object that :meth:`to_json` made."""
        dims: list[Dim] = []
        for axis in values["axes"]:
            if "size" in axis:
                dims.append(int(axis["size"]))
            else:
                dims.append(Axis(axis["name"], axis["min"], axis["opt"], axis["max"]))
        return cls(values["name"], values["dtype"], tuple(dims))


@dataclass(frozen=True)
class GraphSpec:
    """Name of a graph, and its inputs and outputs in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def file(self) -> str:
        """Name of the graph's ``.onnx`` file in a bundle."""
        return f"{self.name}.onnx"

    def axes(self) -> dict[str, Axis]:
        """Returns the elementary axes (those that are no sum) of the graph's inputs, by name."""
        found: dict[str, Axis] = {}
        for spec in self.inputs:
            for dim in spec.dims:
                if isinstance(dim, Axis) and "+" not in dim.name:
                    found.setdefault(dim.name, dim)
        return found

    def lengths(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Returns the length of each elementary axis (an axis that is no sum), from the shapes of the inputs.

        Raises:
            ValueError: A shape has more or fewer dimensions than its input.
        """
        found: dict[str, int] = {}
        for tensor in self.inputs:
            for dim, length in zip(tensor.dims, shapes[tensor.name], strict=True):
                if isinstance(dim, Axis) and "+" not in dim.name:
                    found[dim.name] = length
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns ``inputs`` and ``outputs`` as a JSON object for ``bundle.json`` and ``engine.json``."""
        return {key: [tensor.to_json() for tensor in getattr(self, key)] for key in ("inputs", "outputs")}

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> GraphSpec:
        """Reads a spec from the JSON object that :meth:`to_json` made; ``name`` is the graph's name."""
        inputs, outputs = (tuple(map(TensorSpec.from_json, values[key])) for key in ("inputs", "outputs"))
        return cls(name, inputs, outputs)

    def with_float(self, dtype: str) -> GraphSpec:
        """Returns a copy of the spec with all floating-point tensors in ``dtype``; :data:`SCORES` stay float32."""

        def cast(spec: TensorSpec) -> TensorSpec:
            if spec.dtype != "float32" or spec.name in SCORES:
                return spec
            return TensorSpec(spec.name, dtype, spec.dims)

        return GraphSpec(self.name, tuple(map(cast, self.inputs)), tuple(map(cast, self.outputs)))


@dataclass(frozen=True)
class CacheSpec:
    """Sizes of a decoder's KV cache: number of layers, heads in each layer, and width of a head."""

    num_layers: int
    num_heads: int
    head_dim: int

    def past_names(self) -> list[str]:
        """Names of the decoder's KV cache inputs, layer by layer, key before value."""
        return self.names("past_key_values")

    def present_names(self) -> list[str]:
        """Names of the decoder's KV cache outputs, in the order of :meth:`past_names`."""
        return self.names("present")

    def names(self, prefix: str) -> list[str]:
        """Returns ``PREFIX.{i}.key`` and ``PREFIX.{i}.value`` of each layer i: names of the KV cache tensors."""
        return [f"{prefix}.{i}.{kind}" for i in range(self.num_layers) for kind in ("key", "value")]


@dataclass(frozen=True)
class DraftSpec(CacheSpec):
    """The draft model inside a bridge (``draft.onnx``): the Q-Former's text head.

    Attributes:
        dec_token_id: First token of every text, an id of ``draft_tokenizer.json``.
        end_token_id: Last token of every text.
        max_positions: Length of the longest text in tokens, the first token included.
    """

    dec_token_id: int
    end_token_id: int
    max_positions: int


@dataclass(frozen=True)
class CrossSpec:
    """The keys and values of a decoder's cross-attention, computed once for each request.

    Attributes:
        num_layers: Number of layers with cross-attention.
        num_heads: Number of heads in each layer.
        head_dim: Width of a head.
        source_dim: Width of the tensor that keys and values are computed from: encoder states, patches or visual
            tokens.
        mask: Kind of the decoder's ``cross_attention_mask``, one of :data:`CROSS_MASKS`.
        source: Name of the tensor that keys and values are computed from.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    source_dim: int
    mask: str = "none"
    source: str = "encoder_states"

    def __post_init__(self) -> None:
        if self.mask not in CROSS_MASKS:
            raise ValueError(f"cross mask {self.mask} is not one of {', '.join(CROSS_MASKS)}")

    def names(self) -> list[str]:
        """Names of the ``cross_kv`` graph's outputs, which are inputs of the decoder; per layer, key before value."""
        return [f"cross.{i}.{kind}" for i in range(self.num_layers) for kind in ("key", "value")]


@dataclass(frozen=True)
class ElasticSpec:
    """The numbers of queries that an elastic bridge was trained with: the first m of all queries, for any m in a range.

    Attributes:
        min_queries: The smallest number.
        max_queries: The largest number, which is the number of all queries.
    """

    min_queries: int
    max_queries: int


@dataclass(frozen=True)
class Parity:
    """The largest difference between a graph's output and the reference, and the tolerance.

    Attributes:
        output: Name of the output.
        max_difference: Largest absolute difference over all cases.
        relative: ``max_difference`` divided by the largest absolute value of the reference.
        tolerance: Largest allowed ``relative``.
        cases: The shapes of the inputs, as text.
        sample: Description of the part of the graph that was run; empty for the whole graph.
    """

    output: str
    max_difference: float
    relative: float
    tolerance: float
    cases: Sequence[str] = field(default_factory=tuple)
    sample: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the difference between graph and reference as a JSON object for ``bundle.json``."""
        return {**vars(self), "cases": list(self.cases)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Parity:
        """Reads the difference between graph and reference from the JSON object that :meth:`to_json` made."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        return cls(**{**known, "cases": tuple(known.get("cases", ()))})
