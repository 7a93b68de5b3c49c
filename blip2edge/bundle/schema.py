"""What the halves of the project agree on: tensors, graphs, and the names of a bundle's parts.

Nothing here imports more than the standard library: the exporter writes by it, engines are profiled by it, the
runtime runs by it.
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
"""Of a bridge's outputs that a draft goes on from: ``queries.{i}.{key,value}``, ``[B, H, Q, d]``."""

INSTRUCTION = ("instruction_ids", "instruction_mask")
"""Inputs of a bridge that an instruction enters: int64 ``[B, T]``, padded on the right."""

EMBEDDINGS_FILE = "embed_tokens.safetensors"
EMBEDDINGS_TENSOR = "embed_tokens"
TOKENIZER_FILE = "tokenizer.json"
QFORMER_TOKENIZER_FILE = "qformer_tokenizer.json"
DRAFT_TOKENIZER_FILE = "draft_tokenizer.json"

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "bool")


SCORES = ("logits", "match_logits", "probability")
"""Outputs that are float32 in every precision, as sampling and ranking want them."""


CROSS_MASK = "cross_attention_mask"
CROSS_MASKS = ("none", "keys", "steps")
"""What a decoder is told of the keys that it looks at beside its text: nothing; which are valid, int64 ``[B, E]``;
which each of its slots looks at, int64 ``[B, S, E]`` (a slot that looks at none gets nothing)."""


DraftName = Literal["auto", "none", "lookup", "itg"]
DRAFTS: tuple[DraftName, ...] = get_args(DraftName)
"""Draft models of speculative decoding: none; prompt lookup (n-grams of the prompt and of the text so far); ``itg``,
the Q-Former's text head. ``auto`` is ``itg`` where the bundle has it and decoding is greedy, and none elsewhere."""

BackendName = Literal["auto", "cpu", "openvino", "cuda", "tensorrt", "rtx", "ort-tensorrt"]
"""Names of the backends; ``auto`` is ``cpu``, or what runs the engines of a bundle that holds engines alone."""


@dataclass(frozen=True)
class Axis:
    """A dimension that varies, and the range that engines and checks are made for.

    ``name`` may be a sum of two others (``past + steps``); its range is then the sum of theirs.
    """

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"axis {self.name}: {self.min} <= {self.opt} <= {self.max} does not hold")

    def __add__(self, other: Axis) -> Axis:
        return Axis(
            f"{self.name} + {other.name}", self.min + other.min, self.opt + other.opt, self.max + other.max
        )

    def value(self, sizes: Mapping[str, int]) -> int:
        """Its length where the elementary axes have the lengths ``sizes``."""
        return sum(sizes[part] for part in self.name.split(" + "))


Dim = int | Axis


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor {self.name}: dtype {self.dtype} is not one of {', '.join(DTYPES)}")

    @property
    def width(self) -> int:
        """Its last dimension, where that is the same for all inputs.

        Raises:
            ValueError: It varies.
        """
        last = self.dims[-1]
        if isinstance(last, Axis):
            raise ValueError(f"tensor {self.name}: its last dimension varies ({last.name})")
        return last

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the elementary axes have the lengths ``sizes``."""
        return tuple(dim if isinstance(dim, int) else dim.value(sizes) for dim in self.dims)

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``bundle.json``."""
        axes: list[dict[str, Any]] = []
        for dim in self.dims:
            if isinstance(dim, int):
                axes.append({"size": dim})
            else:
                axes.append({"name": dim.name, "min": dim.min, "opt": dim.opt, "max": dim.max})
        return {"name": self.name, "dtype": self.dtype, "axes": axes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TensorSpec:
        """The inverse of :meth:`to_json`."""
        dims: list[Dim] = []
        for axis in values["axes"]:
            if "size" in axis:
                dims.append(int(axis["size"]))
            else:
                dims.append(Axis(axis["name"], axis["min"], axis["opt"], axis["max"]))
        return cls(values["name"], values["dtype"], tuple(dims))


@dataclass(frozen=True)
class GraphSpec:
    """A graph's name and its tensors, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def file(self) -> str:
        """Its file in a bundle."""
        return f"{self.name}.onnx"

    def axes(self) -> dict[str, Axis]:
        """The elementary axes of its inputs."""
        found: dict[str, Axis] = {}
        for spec in self.inputs:
            for dim in spec.dims:
                if isinstance(dim, Axis) and "+" not in dim.name:
                    found.setdefault(dim.name, dim)
        return found

    def with_float(self, dtype: str) -> GraphSpec:
        """The same graph with its floating-point tensors in ``dtype``; :data:`SCORES` stay float32."""

        def cast(spec: TensorSpec) -> TensorSpec:
            if spec.dtype != "float32" or spec.name in SCORES:
                return spec
            return TensorSpec(spec.name, dtype, spec.dims)

        return GraphSpec(self.name, tuple(map(cast, self.inputs)), tuple(map(cast, self.outputs)))


@dataclass(frozen=True)
class CacheSpec:
    """The keys and values that a decoder carries from step to step."""

    num_layers: int
    num_heads: int
    head_dim: int

    def past_names(self) -> list[str]:
        """Inputs, layer by layer, key before value."""
        return self.names("past_key_values")

    def present_names(self) -> list[str]:
        """Outputs, in the order of :meth:`past_names`."""
        return self.names("present")

    def names(self, prefix: str) -> list[str]:
        """Layer by layer, key before value."""
        return [f"{prefix}.{i}.{kind}" for i in range(self.num_layers) for kind in ("key", "value")]


@dataclass(frozen=True)
class DraftSpec(CacheSpec):
    """The small captioner inside a bridge (``draft.onnx``), whose texts the language model verifies.

    Attributes:
        dec_token_id: What its texts begin with, in ids of ``draft_tokenizer.json``.
        end_token_id: What ends them.
        max_positions: Its longest text, the first token included.
    """

    dec_token_id: int
    end_token_id: int
    max_positions: int


@dataclass(frozen=True)
class CrossSpec:
    """Keys and values of what a decoder looks at beside its own text; computed once a request.

    Attributes:
        num_layers: Layers that look.
        num_heads: Heads.
        head_dim: Width of a head.
        source_dim: Width of what they are computed from: encoder states, patches or visual tokens.
        mask: The decoder's ``cross_attention_mask``, one of :data:`CROSS_MASKS`.
        source: The tensor that they are computed from, by its name.
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
        """Outputs of the ``cross_kv`` graph and inputs of the decoder, key before value."""
        return [f"cross.{i}.{kind}" for i in range(self.num_layers) for kind in ("key", "value")]


MARKERS = ("{image}", "<image>")
"""What stands for a picture in a prompt that holds several, and in a template."""


@dataclass(frozen=True)
class PromptSpec:
    """How a picture and a text become the language model's input.

    Attributes:
        template: Text with one ``{image}`` a picture and one ``{prompt}``. Special tokens are added to the first
            part of it that is not empty: for BLIP-2 to the text behind the picture.
        question: What ``ask`` puts in place of ``{prompt}``, with one ``{question}``; empty where the model
            answers no questions.
        visual_tokens: Slots of a picture, or of a video's frames together.
        bos_token_id: Stands alone where there is no prompt.
        image_token_id: What transformers writes into ``input_ids`` for a slot (the repetition penalty sees it).
        image_token: What the tokenizer itself has for a picture; the text is then tokenised whole, with one in
            each picture's place. Empty where the parts around a picture are tokenised one by one.
        framed: Whether the tokenizer's special tokens frame the text; else it stands behind the BOS alone.
        required: Whether there is no captioning without a prompt.
        default: What ``caption`` puts in place of ``{prompt}`` where none is given; None for nothing.
        frames: Pictures an item: 1, or the frames of a video.
        instruction_positions: The longest instruction that enters the bridge, in tokens of
            ``qformer_tokenizer.json``; 0 where none does.
        picture_token: What stands for a picture that takes no slots, because the decoder looks at it from between
            its layers; a prompt may then hold several. Empty where pictures take slots.
        around_picture: The token before and behind that one; two pictures in a row share it.
        end_token_id: What ends a document: tokens behind it look at no picture before it.
    """

    template: str
    question: str
    visual_tokens: int
    bos_token_id: int | None
    image_token_id: int | None = None
    framed: bool = True
    required: bool = False
    default: str | None = None
    frames: int = 1
    instruction_positions: int = 0
    picture_token: str = ""
    around_picture: str = ""
    end_token_id: int | None = None
    image_token: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``bundle.json``."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PromptSpec:
        """The inverse of :meth:`to_json`."""
        return cls(**{key: values[key] for key in cls.__dataclass_fields__ if key in values})


@dataclass(frozen=True)
class Parity:
    """How far an output is from torch, and how far it may be.

    Attributes:
        output: Its name.
        max_difference: Largest absolute difference over the cases that were run.
        relative: The same, divided by the largest absolute value of the reference.
        tolerance: Bound on ``relative``.
        cases: Shapes that were run, as text.
        sample: Empty where the whole graph was run; else which part was.
    """

    output: str
    max_difference: float
    relative: float
    tolerance: float
    cases: Sequence[str] = field(default_factory=tuple)
    sample: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``bundle.json``."""
        return {**vars(self), "cases": list(self.cases)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Parity:
        """The inverse of :meth:`to_json`."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        return cls(**{**known, "cases": tuple(known.get("cases", ()))})


@dataclass(frozen=True)
class MergingRecord:
    """What merging patches in the vision encoder does (Token Merging, arXiv 2210.09461).

    Attributes:
        merge_tokens: Patches that disappear in each layer.
        embeds: What the vision encoder hands on.
        embeds_before: What it hands on without merging.
        output: What the bridge makes of a picture either way, or the class token where there is no bridge.
        cosine: Of that output with merging to the same without, in torch: the mean; None where it was not run.
        lowest: The lowest of a picture.
        pictures: How many were drawn for it.
    """

    merge_tokens: int
    embeds: int
    embeds_before: int
    output: str = ""
    cosine: float | None = None
    lowest: float | None = None
    pictures: int = 0
