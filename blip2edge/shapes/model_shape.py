"""The sizes of a model as data: its weight matrices, and the tokens that each matrix is multiplied with.

Parameters, bytes and operations of a model follow from these matrices. Only the standard library is imported, so that
a board without torch can compute them from a ``config.json`` (:mod:`.families`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from blip2edge.bundle.schema import BRIDGE, DECODER, TEXT_ENCODER, VISION
from blip2edge.errors import UsageError, option

TokenCounts = Mapping[str, int]
"""Numbers of tokens by the names that matrices use:

- ``grid``, ``patches``: patches of a picture without and with the class token;
- ``embeds``: embeddings that the vision encoder returns;
- ``queries``, ``instruction``: query tokens and instruction tokens of the bridge;
- ``encoder``: tokens that a text encoder reads;
- ``source``: embeddings that the decoder cross-attends to;
- ``steps``, ``context``: new tokens of a run of the decoder, and keys that they attend to;
- ``asked``: tokens that logits are computed for.

A matrix may also use a sum of two names, such as ``queries+instruction``, or a number in digits.
"""

WEIGHT_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "fp16": 2.0,
    "int8": 1.0,
    "int8-weights": 1.0 + 4 / 64,
    "int4": 0.5 + 4 / 128,
}
"""Bytes of a weight by its format.

``int8``: 8-bit weights and activations, one scale for each column; the scales are not counted. ``int8-weights`` and
``int4``: blocks of 64 and 128 weights that share a float32 scale (calibration/weights/blocks.py).
"""

FORMATS: Mapping[str, Mapping[str, str]] = {
    "fp32": {VISION: "fp32", BRIDGE: "fp32", "language": "fp32", "table": "fp32"},
    "fp16": {VISION: "fp16", BRIDGE: "fp16", "language": "fp16", "table": "fp16"},
    "int8": {VISION: "int8", BRIDGE: "int8", "language": "int8-weights", "table": "int8-weights"},
    "int4": {VISION: "int8", BRIDGE: "int8", "language": "int4", "table": "int8-weights"},
}
"""Weight format of vision encoder, bridge, language model and token table, by the bundle's precision.

These are the formats that ``export`` and ``calibrate --weights`` write.
"""


@dataclass(frozen=True)
class HeldWeights:
    """Format and size of the weights of one graph in memory.

    Attributes:
        kind: Format of the weights, a key of :data:`WEIGHT_BYTES`.
        bytes: Size of the weights in bytes.
    """

    kind: str
    bytes: float

    @property
    def floating(self) -> bool:
        """Whether matrix multiplications with these weights run in floating point, in the format of the weights."""
        return self.kind in ("fp32", "fp16")


FUSED_OPERATORS = 3
"""Number of operators in an optimized graph for each matrix multiplication with weights, this one included.

It is 2.7 to 3.2 in vision encoders, Q-Formers and OPT's decoder. A decoder with cross-attention has 5 to 9, because its
attention is not fused to one operator. Counted in the graphs of ``benchmarks/plan_check.py``.
"""


@dataclass(frozen=True)
class WeightMatrix:
    """One or more weight matrices of the same size.

    Attributes:
        name: What the matrix computes.
        inputs, outputs: Numbers of input and output channels.
        rows: Name of the tokens that the matrix is multiplied with, a key of :data:`TokenCounts`.
        count: Number of such matrices.
        bias: Whether each matrix has a bias.
    """

    name: str
    inputs: int
    outputs: int
    rows: str
    count: int = 1
    bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights without biases."""
        return self.count * self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return self.weights + self.count * self.outputs * self.bias

    def operations(self, tokens: TokenCounts, extra_rows: int = 0, one_row: bool = True) -> float:
        """Number of additions and multiplications: two for each weight and token.

        Args:
            tokens: Numbers of tokens.
            extra_rows: Number of tokens to add if there is more than one, for processors that are less efficient with
                few tokens.
            one_row: Whether the first token counts. Use False if the time to read the weights already includes the
                multiplication of one token.
        """
        rows = tokens_of(self.rows, tokens)
        return 2.0 * self.weights * (rows - (not one_row) + (extra_rows if rows > 1 else 0))


@dataclass(frozen=True)
class AttentionProducts:
    """The matrix multiplications without weights in an attention: the scores, and the weighted sum of the values.

    Attributes:
        width: Heads times width of a head.
        heads: Number of heads.
        queries, keys: Names of the tokens that attend, and of the tokens that are attended to; keys of
            :data:`TokenCounts`.
        count: Number of layers.
    """

    width: int
    heads: int
    queries: str
    keys: str
    count: int

    def operations(self, tokens: TokenCounts) -> float:
        """Number of additions and multiplications.

        They are two for the scores and two for the weighted sums, for each query, key and channel.
        """
        return 4.0 * self.count * self.width * tokens_of(self.queries, tokens) * tokens_of(self.keys, tokens)

    def scores(self, tokens: TokenCounts) -> int:
        """Number of attention scores of one layer."""
        return self.heads * tokens_of(self.queries, tokens) * tokens_of(self.keys, tokens)


@dataclass(frozen=True)
class ModelPart:
    """The sizes of one graph of a bundle, such as the vision encoder.

    Attributes:
        name: Name of the graph.
        matrices: Weight matrices of the graph.
        attentions: Matrix multiplications without weights (attention scores and weighted sums).
        vectors: Number of all other parameters: norms, positions, learned queries.
        operators: Operators in the CPU's optimized graph without convolutions, divided by the number of matrix
            multiplications with weights; :data:`FUSED_OPERATORS` if attention, norms and activations are fused.
        kernels: Whether the backend ``cuda-decoder`` has kernels for this graph.
    """

    name: str
    matrices: tuple[WeightMatrix, ...]
    attentions: tuple[AttentionProducts, ...] = ()
    vectors: int = 0
    operators: int = FUSED_OPERATORS
    kernels: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(matrix.parameters for matrix in self.matrices) + self.vectors

    @property
    def kind(self) -> str:
        """Key of this graph in :data:`FORMATS`: ``vision``, ``bridge`` or ``language``."""
        return self.name if self.name in (VISION, BRIDGE) else "language"

    def bytes(self, precision: str) -> float:
        """Bytes of the graph's weights in a precision; biases, norms and tables stay in floating point."""
        weights = sum(matrix.weights for matrix in self.matrices)
        rest = WEIGHT_BYTES["fp16" if precision == "fp16" else "fp32"]
        return weights * WEIGHT_BYTES[FORMATS[precision][self.kind]] + (self.parameters - weights) * rest

    def weights(self, precision: str) -> HeldWeights:
        """Format and size of the graph's weights in a precision."""
        return HeldWeights(FORMATS[precision][self.kind], self.bytes(precision))

    @property
    def calls(self) -> int:
        """Number of matrix multiplications with weights in one run of the graph."""
        return sum(matrix.count for matrix in self.matrices)

    def elements(self, tokens: TokenCounts) -> float:
        """Number of values that the operators between the matrix multiplications compute.

        They are the outputs of all matrices, and three values for each attention score.
        """
        outputs = sum(one.count * one.outputs * tokens_of(one.rows, tokens) for one in self.matrices)
        return float(outputs + 3 * sum(one.count * one.scores(tokens) for one in self.attentions))

    def activation_bytes(self, tokens: TokenCounts, element: float) -> float:
        """Largest total size in bytes of the activations that are in memory at the same time.

        These are the input, the output and the residual of the widest matrix; or the queries, keys and values of one
        layer, and its scores before and after softmax. A value has ``element`` bytes.
        """
        widest = max((matrix.inputs + 2 * matrix.outputs) * tokens_of(matrix.rows, tokens) for matrix in self.matrices)
        scores = [
            2 * attention.scores(tokens)
            + attention.width * (2 * tokens_of(attention.queries, tokens) + 2 * tokens_of(attention.keys, tokens))
            for attention in self.attentions
        ]
        return max([widest, *scores]) * element


def tokens_of(name: str, tokens: TokenCounts) -> int:
    """Returns the number of tokens for a name in :data:`TokenCounts`, or for a sum of such names (``a+b``)."""
    return sum(int(part) if part.isdigit() else tokens[part] for part in name.split("+"))


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the keys and values that the decoder keeps.

    Attributes:
        layers, heads, head_dim: Sizes of the self-attention, which keeps one key and one value for each token.
        cross: Channels of the cross-attention's keys in all layers together; 0 without cross-attention.
    """

    layers: int
    heads: int
    head_dim: int
    cross: int = 0

    def bytes(self, context: int, source: int, element: float) -> float:
        """Returns the bytes of the keys and values of one batch row.

        ``context`` tokens are cached, ``source`` embeddings are cross-attended to, and a value has ``element`` bytes.
        """
        own = self.layers * self.heads * self.head_dim * context
        return 2 * (own + self.cross * source) * element


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that determine its memory and its time.

    Attributes:
        family: Name of the family, as in ``bundle.json``.
        parts: The graphs: vision encoder, bridge, text encoder, keys and values of the cross-attention, decoder.
        bridge: Kind of the bridge: ``qformer``, ``instructed-qformer``, ``mlp``, ``perceiver``, ``pool`` or ``none``.
        image_size, patch_size: Sides of picture and patch in pixels; a ``patch_size`` of 0 is not known.
        keep_class: Whether the bridge gets the class token and all other tokens before the patches. If False, a LLaVA
            drops the first embedding; with a SigLIP, which has no class token, that is the first patch.
        queries: Number of query tokens of the bridge; 0 for a bridge without query tokens.
        least_queries: Smallest number of query tokens that the bridge works with: ``queries`` for a bundle that needs
            all; 1 for a checkpoint.
        slots: Number of text positions for a picture's visual tokens; 0 if the decoder cross-attends to the picture.
        frames: Number of pictures for one caption: 1, or the frames of a video.
        max_positions: Longest context in tokens.
        table, tied: Rows and width of the token table, and whether the head is the transposed table.
        cache: Sizes of the KV cache.
        source: Tokens that the decoder cross-attends to: ``embeds``, ``queries`` or ``encoder``; else empty.
        width: Width of the language model's layers.
        text_side: Parameters of the Q-Former's text side, which is used in pretraining and not deployed.
        prefix: Number of positions before the patches: the class token and registers.
        unused: Parameters of the published checkpoint that are not deployed.
        cells: Patches of a picture if their number does not follow from ``image_size`` and ``patch_size``; else 0.
    """

    family: str
    parts: tuple[ModelPart, ...]
    bridge: str
    image_size: int
    patch_size: int
    keep_class: bool
    queries: int
    slots: int
    max_positions: int
    table: tuple[int, int]
    tied: bool
    cache: CacheShape
    width: int
    source: str = ""
    frames: int = 1
    text_side: int = 0
    unused: int = 0
    least_queries: int = 1
    prefix: int = 1
    cells: int = 0

    def part(self, name: str) -> ModelPart | None:
        """Returns the sizes of the graph ``name``; None if the model has no such graph."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def decoder(self) -> ModelPart:
        """The sizes of the decoder, which every captioning model has."""
        return next(part for part in self.parts if part.name == DECODER)

    @property
    def patches(self) -> int:
        """Number of a picture's positions in the vision encoder, class token and registers included."""
        return int((self.cells or (self.image_size // self.patch_size) ** 2) + self.prefix)

    @property
    def embeds(self) -> int:
        """Number of embeddings that the vision encoder returns for a picture."""
        return self.patches - (0 if self.keep_class else max(self.prefix, 1))

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens of a picture.

        They take positions in the text, or the decoder attends to them by cross-attention.
        """
        return self.queries or self.embeds

    @property
    def table_parameters(self) -> int:
        """Number of parameters of the token embedding table; 0 if the head has the same (tied) parameters."""
        return 0 if self.tied else self.table[0] * self.table[1]

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: ``vision``, ``bridge``, ``language``, and ``total``; a shared matrix counts once."""
        of = {part.name: part.parameters for part in self.parts}
        vision, bridge = of.pop(VISION), of.pop(BRIDGE, 0)
        language = sum(of.values()) + self.table_parameters
        return {"vision": vision, "bridge": bridge, "language": language, "total": vision + bridge + language}

    def table_bytes(self, precision: str) -> float:
        """Bytes of the file of the token embedding table; 0 if the table is tied to the head, and both are in int8."""
        table = FORMATS[precision]["table"]
        if self.tied and table == FORMATS[precision]["language"] == "int8-weights":
            return 0.0
        return self.table[0] * self.table[1] * WEIGHT_BYTES[table]

    def weight_bytes(self, precision: str) -> float:
        """Bytes of all weights of a bundle."""
        return sum(part.bytes(precision) for part in self.parts) + self.table_bytes(precision)

    def tokens(self, frames: int, text: int) -> dict[str, int]:
        """Returns the numbers of tokens of a request, by the names in :data:`TokenCounts`.

        The request has ``frames`` pictures and ``text`` prompt tokens. The counts ``steps`` and ``context`` are those
        of the prefill.
        """
        prompt = self.slots * frames + text
        counts = {
            "grid": self.patches - self.prefix,
            "patches": self.patches,
            "embeds": self.embeds,
            "queries": self.queries,
            "instruction": text if self.bridge == "instructed-qformer" else 0,
            "encoder": prompt,
            "asked": 1,
        }
        source = counts[self.source] * (1 if self.source == "encoder" else frames) if self.source else 0
        steps = 1 if self.part(TEXT_ENCODER) is not None else prompt
        return {**counts, "source": source, "steps": steps, "context": steps}

    def with_bridge(self, kind: str, bridge: ModelPart, queries: int) -> ModelShape:
        """Returns the sizes of the same model with another bridge, whose visual tokens are a part of the prompt.

        Args:
            kind: Kind of the bridge.
            bridge: Sizes of the bridge's graph.
            queries: Number of the bridge's query tokens; 0 if it makes a visual token from each embedding.
        """
        parts = tuple(bridge if part.name == BRIDGE else part for part in self.parts)
        return replace(
            self, bridge=kind, parts=parts, queries=queries, slots=queries or self.embeds, text_side=0, unused=0
        )

    def with_queries(self, queries: int) -> ModelShape:
        """Returns the sizes of the same model with only the first ``queries`` query tokens of its bridge.

        Raises:
            UsageError: The bridge has no query tokens, or fewer than ``queries``; or the bundle needs more than
                ``queries``.
        """
        if not self.queries:
            raise UsageError(
                f"{option('queries')} {queries}: the bridge ({self.bridge}) has no query tokens",
                f"leave {option('queries')} out",
            )
        if self.least_queries == self.queries > 1:
            raise UsageError(
                f"{option('queries')} {queries}: the bridge was trained with all of its {self.queries} queries only",
                f"leave {option('queries')} out, or give the checkpoint to plan a bridge of fewer queries",
            )
        if not self.least_queries <= queries <= self.queries:
            raise UsageError(f"expected {option('queries')} from {self.least_queries} to {self.queries}, got {queries}")
        return replace(self, queries=queries, slots=min(self.slots, queries))
