"""Refuses checkpoints whose weights are quantised, or have an adapter that is not merged into them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from blip2edge.errors import CheckpointError, some
from blip2edge.model.checkpoint.stored.tensors import FLOAT_DTYPES, TensorFiles, dtype_name

CONFIG_KEYS = ("quantization_config", "compression_config")

DEQUANTISE = (
    "export the checkpoint in float16 that it was made from; or load it with transformers, call model.dequantize() "
    "where the method has it, and save_pretrained again"
)
MERGE = "call merge_and_unload() of the PEFT model, and save_pretrained again"

MARKS = (
    (
        r"(SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)",
        "bitsandbytes",
        DEQUANTISE,
    ),
    (r"(qweight|qzeros|g_idx)", "GPTQ or AWQ", DEQUANTISE),
    (r"(W_q|weight\._data|weight\._scale|weight:.+|_weight_qdata)", "HQQ, quanto or torchao", DEQUANTISE),
    (r"(codes|codebooks|centroids)", "AQLM or VPTQ", DEQUANTISE),
    (
        r"((weight|input|activation|output)_(scale|scale_inv|scales|packed|zero_point|shape|global_scale|blocks))",
        "FP8 or compressed-tensors",
        DEQUANTISE,
    ),
    (r"(lora_\w+(\..+)?|base_layer\..+|modules_to_save\..+)", "a PEFT adapter that is not merged", MERGE),
)
"""Endings of tensor names (regular expressions) that show quantised weights or an adapter.

Each row also has the method that writes such tensors, and the advice to the user.
"""


def refuse_quantized(values: Mapping[str, Any], files: TensorFiles, used: Collection[str]) -> None:
    """Raises an error if ``config.json`` or the tensors show quantised weights. No weight is read.

    Args:
        values: Content of ``config.json``.
        files: The checkpoint's tensors.
        used: Names of the tensors that the model's parameters are read from.

    Raises:
        CheckpointError: Weights are quantised, or an adapter is not merged.
    """
    said = next(_quantized_sections(values), None)
    marks, mend = _marks(files)
    wrong = sorted(name for name in used if files.dtypes.get(name, FLOAT_DTYPES[0]) not in FLOAT_DTYPES)
    if said is None and mend == MERGE:
        raise CheckpointError(f"{files.directory} holds {marks}", mend)
    if said is None and not marks and not wrong:
        return
    found = [f"config.json says so in {said[0]} ({said[1]})"] if said else []
    if marks:
        found.append(f"its tensors are {marks}")
    if wrong:
        dtype = dtype_name(files.dtypes[wrong[0]])
        found.append(f"{some(wrong)} stored as {dtype}")
    if not marks and not wrong:
        mend = (
            "its tensors are in floating point: if they have been dequantised, delete that key; else export the "
            "checkpoint that it was made from"
        )
    raise CheckpointError(
        f"the weights of {files.directory} are quantised, and export reads weights in floating point: "
        + "; ".join(found),
        mend or DEQUANTISE,
    )


def _quantized_sections(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields each key of a config that describes a quantisation, with the name of the quantisation method."""
    sections = {"": values} | {f"{name}.": part for name, part in values.items() if isinstance(part, Mapping)}
    for section, part in sections.items():
        for key in CONFIG_KEYS:
            content = part.get(key)
            if content:
                yield f"{section}{key}", _method(content if isinstance(content, Mapping) else {})


def _method(content: Mapping[str, Any]) -> str:
    """Returns the quantisation method in a ``quantization_config``, with the number of bits if it is set."""
    bits = content.get("bits") or content.get("nbits")
    loads = [bits for bits in (4, 8) if content.get(f"load_in_{bits}bit") or content.get(f"_load_in_{bits}bit")]
    method = (
        content.get("quant_method") or content.get("quant_algo") or ("bitsandbytes" if loads else "no method named")
    )
    bits = bits or (loads[0] if loads else None)
    return f"{method}, {bits} bit" if bits else str(method)


def _marks(files: TensorFiles) -> tuple[str, str | None]:
    """Finds tensors whose names belong to a quantisation method or to an adapter.

    Returns a description with a few names (empty if there are none), and the advice for the user or None.
    """
    for pattern, what, mend in MARKS:
        names = sorted(name for name in files.shapes if re.search(rf"\.{pattern}$", name))
        if names:
            return f"{what}: {some(names)}", mend
    return "", None
