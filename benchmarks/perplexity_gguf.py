"""Measures the perplexity of llama.cpp's formats, on the windows of ``benchmarks/perplexity.py``.

    python benchmarks/gguf_variants.py SOURCE.gguf --out GGUF
    python benchmarks/perplexity_gguf.py BUNDLE --texts TEXTS --gguf Q8_0=GGUF/Q8_0.gguf --gguf Q4_0=GGUF/Q4_0.gguf

transformers reads each file (``pip install gguf``) and computes in float32 with the rounded weights. llama.cpp also
rounds activations, so the perplexity in llama.cpp itself is not lower. The tokenizer is the bundle's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from perplexity import WINDOW, windows
from reporting import bundle_path, named_path, parser_of, versions, write_result
from transformers import AutoModelForCausalLM

from blip2edge.bundle.bundle import Bundle
from blip2edge.cli import run_script


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Returns the perplexity of a model on windows of token ids ``[N, T]``; a window's first token is not scored."""
    lost = 0.0
    for row in rows:
        logits = model(row[None]).logits[0, :-1].double()
        lost += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return float(torch.tensor(lost / rows[:, 1:].numel()).exp())


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--gguf", type=named_path, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=20480, help="smallest number of tokens of the evaluation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = torch.from_numpy(
        windows(Bundle.open(options.bundle), options.texts / "evaluation.txt", -(-options.tokens // (WINDOW - 1)))
    )
    results = {}
    for name, path in options.gguf:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        results[name] = {
            "perplexity": perplexity(model, rows),
            "tokens": rows[:, 1:].numel(),
            "bytes": path.stat().st_size,
        }
        print(name, results[name])
    write_result(options.json, versions=versions("transformers", "torch", "gguf"), results=results)


if __name__ == "__main__":
    run_script(main)
