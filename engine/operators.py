"""Lists the operators that TensorRT's ONNX parser supports, by version.

Sources in onnx-tensorrt: docs/operators.md of the releases 10.1 and 10.15, and docs/Changelog.md up to 10.15. The
tables of 10.3 and 10.13 are the table of 10.1 with the changes that the changelog names. For 10.16 and 11.4 no document
was available: they have the table of 10.15, and operators that were added after 10.15 are missing.

The tables list only operators that exported graphs use or could use; all others count as not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
NUMBERS = FLOATS | {"INT32", "INT64"}
PLAIN = NUMBERS | {"BOOL"}
BOOL = frozenset({"BOOL"})
QUANTISED = frozenset({"INT8", "INT4", "FLOAT8E4M3FN"})

Types = Mapping[str, frozenset[str]]


def _each(names: str, types: frozenset[str]) -> dict[str, frozenset[str]]:
    return dict.fromkeys(names.split(), types)


COMMON: Types = {
    **_each("And Not Or Xor", BOOL),
    **_each(
        "Ceil Clip Conv ConvTranspose Cos CumSum Erf Exp Floor Gemm HardSigmoid LayerNormalization LeakyRelu Log "
        "LogSoftmax LpNormalization MatMul Reciprocal Round Sigmoid Sin Softmax Softplus Sqrt Tanh",
        FLOATS,
    ),
    **_each("Pow", FLOATS),
    **_each(
        "Abs Add ArgMax ArgMin Div Equal Gelu Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Neg Pad "
        "Range ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
        "ScatterElements ScatterND Sign Sub Sum TopK",
        NUMBERS,
    ),
    **_each(
        "Concat ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity Reshape Shape Size Slice Split "
        "Squeeze Tile Transpose Unsqueeze Where",
        PLAIN,
    ),
    **_each("Cast", PLAIN | {"UINT8"}),
    **_each("Constant", PLAIN | QUANTISED),
    **_each("QuantizeLinear", FLOATS),
    **_each("DequantizeLinear", QUANTISED),
}
"""Operators that every version from 10.3 on supports, with the types that their first input may have."""

CONSTANT_INPUTS: Mapping[str, tuple[int, ...]] = {
    "CumSum": (1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}
"""Indices of inputs that must be constant, by operator; from 10.7 on, Squeeze and Unsqueeze have no such input."""

SINGLE_OUTPUT = frozenset({"LayerNormalization"})
"""Operators for which TensorRT supports only the first output."""


@dataclass(frozen=True)
class ParserVersion:
    """The operators that one version of TensorRT supports.

    Attributes:
        name: Product and version, for messages.
        opset: The newest ONNX opset that the version's documentation names.
        quantised_opset: The newest opset for graphs with QuantizeLinear or DequantizeLinear. Scales for blocks of
            weights need opset 21.
        added: Operators in addition to :data:`COMMON`, with the types of their first input.
        changed: Operators of :data:`COMMON` whose first input may have other types in this version.
        block_types: Types of weights that DequantizeLinear supports with one scale for each block.
        loose_axes: Operators of :data:`CONSTANT_INPUTS` whose inputs need not be constant in this version.
    """

    name: str
    opset: int
    quantised_opset: int
    added: Types = field(default_factory=dict)
    changed: Types = field(default_factory=dict)
    block_types: frozenset[str] = frozenset({"INT4"})
    loose_axes: frozenset[str] = frozenset()

    def types_of(self, operator: str) -> frozenset[str] | None:
        """Returns the types that the operator's first input may have; None if the operator is not supported."""
        for table in (self.changed, self.added, COMMON):
            if operator in table:
                return table[operator]
        return None


_ANY_AXES = frozenset({"Squeeze", "Unsqueeze"})
_POW = {"Pow": NUMBERS}
_LLM = {"Attention": FLOATS, "RotaryEmbedding": FLOATS, "RMSNormalization": FLOATS, "TensorScatter": FLOATS}

VERSIONS: Mapping[str, ParserVersion] = {
    "10.3": ParserVersion("TensorRT 10.3", 20, 21),
    "10.13": ParserVersion("TensorRT 10.13", 22, 22, changed=_POW, loose_axes=_ANY_AXES),
    "10.15": ParserVersion("TensorRT 10.15", 24, 24, added=_LLM, changed=_POW, loose_axes=_ANY_AXES),
    "10.16": ParserVersion("TensorRT 10.16", 24, 24, added=_LLM, changed=_POW, loose_axes=_ANY_AXES),
    "11.4": ParserVersion("TensorRT 11.4", 24, 24, added=_LLM, changed=_POW, loose_axes=_ANY_AXES),
    "rtx": ParserVersion(
        "TensorRT for RTX 1.7",
        24,
        24,
        added=_LLM,
        changed=_POW,
        block_types=frozenset({"INT4", "INT8"}),
        loose_axes=_ANY_AXES,
    ),
}
"""The tables, by TensorRT version; for a version between two tables, the older table is used."""
