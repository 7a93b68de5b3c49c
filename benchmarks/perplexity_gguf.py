"""The perplexity of llama.cpp's formats, on the windows of ``benchmarks/perplexity.py``.

    python benchmarks/gguf_variants.py SOURCE.gguf --out GGUF
    python benchmarks/perplexity_gguf.py BUNDLE --texts TEXTS --gguf Q8_0=GGUF/Q8_0.gguf --gguf Q4_0=GGUF/Q4_0.gguf

transformers reads each file (``pip install gguf``) and computes in float32 with the weights as they were rounded: the
best that the format can do, as llama.cpp rounds activations too. The bundle lends its tokenizer.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from perplexity import WINDOW, windows
from race import write
from transformers import AutoModelForCausalLM

from blip2edge.bundle.bundle import Bundle


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path)


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Of windows ``[N, T]``; the first token of each is not scored."""
    lost = 0.0
    for row in rows:
        logits = model(row[None]).logits[0, :-1].double()
        lost += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return float(torch.tensor(lost / rows[:, 1:].numel()).exp())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--gguf", type=_named, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=20480, help="at least")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = torch.from_numpy(
        windows(
            Bundle.open(options.bundle), options.texts / "evaluation.txt", -(-options.tokens // (WINDOW - 1))
        )
    )
    results = {}
    for name, path in options.gguf:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
        results[name] = {
            "perplexity": perplexity(model, rows),
            "tokens": rows[:, 1:].numel(),
            "bytes": path.stat().st_size,
        }
        print(name, results[name])
    versions = {name: version(name) for name in ("transformers", "torch", "gguf")}
    write(options.json, versions=versions, results=results)


if __name__ == "__main__":
    main()
