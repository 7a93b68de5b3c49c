"""Measures a vision encoder in fp32 and INT8, in ONNX Runtime with default options, OpenVINO and blip2edge.

    python benchmarks/peers_vision.py FP32 INT8 --openvino-python VENV/bin/python --json FILE

Both arguments are bundles. The INT8 bundle is made by ``blip2edge calibrate``; its encoder is a symmetric Q/DQ graph,
which TensorRT also accepts.
"""

from __future__ import annotations

from pathlib import Path

from race import Contestant, race, table, versions
from reporting import bundle_path, parser_of, write_result

from blip2edge.cli import run_script


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("fp32", type=bundle_path)
    parser.add_argument("int8", type=bundle_path)
    parser.add_argument("--openvino-python", help="Python interpreter whose environment has openvino")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    graph = "vision_encoder.onnx"
    contestants = [
        Contestant("ONNX Runtime fp32", "onnx", str(options.fp32 / graph)),
        Contestant("blip2edge fp32", "vision", str(options.fp32)),
        Contestant("ONNX Runtime INT8, the file as it is", "onnx", str(options.int8 / graph)),
        Contestant("blip2edge INT8", "vision", str(options.int8)),
    ]
    if options.openvino_python:
        python = options.openvino_python
        contestants += [
            Contestant("OpenVINO fp32", "openvino", str(options.fp32 / graph), python),
            Contestant("OpenVINO bf16 (its default)", "openvino", f"{options.fp32 / graph}:bf16", python),
            Contestant("OpenVINO INT8, the same file", "openvino", str(options.int8 / graph), python),
        ]
    seconds = race(contestants, {"run": ["run"]}, options.rounds)
    rows = table(seconds, contestants[0].name)
    for row in rows:
        print(f"{row['name']:40s} {row['run']['cpu_ms']:8.1f} ms  {row['run']['times']:.2f}")
    packages = ("onnxruntime", "openvino", "numpy")
    write_result(options.json, versions=versions(contestants, packages), rounds=seconds, results=rows)


if __name__ == "__main__":
    run_script(main)
