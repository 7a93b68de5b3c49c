"""Writes a bundle whose decoder has integer weights, to measure its speed; needs no calibration pictures.

    python benchmarks/rounded.py BUNDLE --out BUNDLE4 --weights int4

The weights are rounded to nearest, in blocks. Size and kernels are the same as after ``blip2edge calibrate --weights``.
The quality is lower, which does not matter for random weights. The other graphs are copied unchanged.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from reporting import bundle_path, parser_of

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.formats import GraphFormat, NumberFormat
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import find_targets
from blip2edge.calibration.weights.quantize import PRECISIONS
from blip2edge.calibration.weights.weight_only import choose_formats, quantize_matrices
from blip2edge.choices import WEIGHT_BITS
from blip2edge.cli import run_script
from blip2edge.optimization.pipeline import optimize

FLOATS = ("fp32", "fp16")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", choices=WEIGHT_BITS, required=True)
    options = parser.parse_args()
    source = Bundle.open(options.bundle)
    if source.graph(DECODER).precision not in FLOATS:
        raise SystemExit(f"the decoder of {options.bundle} is rounded already: give a bundle in fp32")
    options.out.mkdir(parents=True)
    replaced = {f"{DECODER}.onnx", f"{DECODER}.onnx.data"}
    for name in source.manifest.files.keys() - replaced:
        shutil.copyfile(source.file(name), options.out / name)
    model = ir.load(source.file(f"{DECODER}.onnx"))
    targets = find_targets(model)
    formats, _ = choose_formats(targets.products, GraphFormat(NumberFormat(options.weights)))
    with DataFile(options.out / f"{DECODER}.onnx.data") as file:
        quantize_matrices(model, targets.products, file, formats, plain=True)
    ir.save(model, options.out / f"{DECODER}.onnx")
    graphs = dict(source.manifest.graphs)
    graphs[DECODER] = replace(graphs[DECODER], precision=PRECISIONS[WEIGHT_BITS[options.weights]], parity=())
    files = {
        name: FileRecord.of(options.out / name) if name in replaced else record
        for name, record in source.manifest.files.items()
    }
    replace(source.manifest, graphs=graphs, files=files).write(options.out)
    for name, graph in optimize(options.out).record.graphs.items():
        print(name, ", ".join(graph.passes), graph.milliseconds, os.linesep, end="")


if __name__ == "__main__":
    run_script(main)
