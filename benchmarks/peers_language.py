"""Measures a language model's decoder in blip2edge, transformers, optimum-onnx and llama.cpp, with the same weights.

    python benchmarks/peers_language.py --bundle fp32=BUNDLE --bundle int8=BUNDLE8 --eager SMOLLM2
        --gguf Q8_0=FILE --llama-python VENV/bin/python --json FILE

The bundles come from ``benchmarks/smollm2_captioner.py``, calibrated with ``--weights int8`` or ``int4``. The GGUF
files of ``benchmarks/gguf_variants.py`` have the same weights, from the file that ``benchmarks/smollm2.py`` fetches.
Measures the prefill of ``--prompt`` tokens, and the decoding of ``--tokens`` more.
"""

from __future__ import annotations

from pathlib import Path

from race import Contestant, race, table, versions
from reporting import named_bundle, named_path, parser_of, write_result

from blip2edge.cli import run_script


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--bundle", type=named_bundle, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--gguf", type=named_path, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--eager", metavar="DIR", help="directory of the language model, to measure transformers")
    parser.add_argument("--llama-python", help="Python interpreter whose environment has xllamacpp")
    parser.add_argument("--optimum", metavar="DIR", help="directory of the same model, exported by optimum-onnx")
    parser.add_argument("--optimum-python", help="Python interpreter whose environment has optimum-onnx")
    parser.add_argument(
        "--base", help="name of the row to which times are compared (default: the first GGUF file, else the first row)"
    )
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    contestants = [
        Contestant(f"llama.cpp {name}", "llama", str(path), options.llama_python) for name, path in options.gguf
    ]
    if options.eager:
        contestants.append(Contestant("transformers eager fp32", "eager", options.eager))
    if options.optimum:
        contestants.append(Contestant("optimum-onnx fp32", "optimum", options.optimum, options.optimum_python))
    for name, path in options.bundle:
        contestants.append(Contestant(f"ONNX Runtime, portable graph, {name}", "ours", f"{path}:portable"))
        contestants.append(Contestant(f"blip2edge {name}", "ours", str(path)))
    tasks = {"prefill": ["prefill", options.prompt], "decode": ["decode", options.prompt, options.tokens]}
    seconds = race(contestants, tasks, options.rounds)
    rows = table(seconds, options.base or contestants[0].name)
    for row in rows:
        cells = (f"{task} {row[task]['cpu_ms']:8.1f} ms {row[task]['times']:5.2f}" for task in tasks)
        print(f"{row['name']:42s} {'   '.join(cells)}")
    packages = (
        "onnxruntime",
        "transformers",
        "torch",
        "optimum",
        "optimum-onnx",
        "xllamacpp",
        "numpy",
    )
    write_result(
        options.json, versions=versions(contestants, packages), prompt=options.prompt, tokens=options.tokens,
        rounds=seconds, results=rows,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
