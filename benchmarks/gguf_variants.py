"""Converts a GGUF file to Q8_0 and Q4_0, with llama.cpp's own rounding (its ``gguf`` package).

    python benchmarks/gguf_variants.py SOURCE.gguf --out DIR

Writes ``Q8_0.gguf`` (every matrix in Q8_0) and ``Q4_0.gguf`` (every matrix in Q4_0, except the token embedding table,
which is also the head). The table stays in Q8_0, as in llama.cpp's own quantizer if the row size is not a multiple of
256. Needs ``pip install gguf``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants
from reporting import parser_of

from blip2edge.cli import run_script

TABLE = "token_embd.weight"
FORMATS = {
    "Q8_0": (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q4_0),
}
"""Type of the matrices, type of the token embedding table, and file type, by the name of the variant."""

OWN = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")
"""Fields of the source file that are not copied, because GGUFWriter writes them itself."""


def write(source: GGUFReader, out: Path, name: str) -> None:
    """Writes the GGUF file of one variant."""
    matrices, table, file_type = FORMATS[name]
    architecture = bytes(source.fields["general.architecture"].parts[-1]).decode()
    writer = GGUFWriter(out, architecture)
    writer.add_file_type(file_type)
    for key, field in source.fields.items():
        if key in OWN:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for tensor in source.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        kind = table if tensor.name == TABLE else matrices
        writer.add_tensor(tensor.name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in FORMATS:
        write(GGUFReader(options.source), options.out / f"{name}.gguf", name)
        print(options.out / f"{name}.gguf")


if __name__ == "__main__":
    run_script(main)
