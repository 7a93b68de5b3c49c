"""Measures the CPU seconds from the start of a process to the first token after a text prompt, for one program.

    python benchmarks/first_token.py ours BUNDLE
    python benchmarks/first_token.py llama FILE.gguf

The program is blip2edge (``ours``) or llama.cpp (``llama``). ``benchmarks/startup.py`` starts both in turn. The process
imports only the packages of its program.
"""

from __future__ import annotations

import sys
import time

PROMPT = "The capital of France is a city that is known for its"


def ours(path: str) -> str:
    """Generates the first token with a bundle's decoder, token embedding table and tokenizer, without a picture."""
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.schema import DECODER
    from blip2edge.runtime.backends.open_graph import GraphOpener
    from blip2edge.runtime.decoding.decoder import decoder_of
    from blip2edge.runtime.text.tokenizer import Tokenizer

    bundle = Bundle.open(path)
    tokenizer = Tokenizer.from_file(bundle.file("tokenizer.json"))
    decoder = decoder_of(bundle, GraphOpener(bundle, "cpu", 1)(DECODER))
    logits, _ = decoder.prefill([decoder.table.rows(tokenizer.encode(PROMPT))])
    return tokenizer.decode([int(logits[0].argmax())])


def llama(path: str) -> str:
    """Generates the first token with the same weights in llama.cpp, without its warm-up run."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads, threads.poll = 1, 0
    request = {"prompt": PROMPT, "n_predict": 1, "temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
    return str(xllamacpp.Server(params).handle_completions(request)["choices"][0]["text"])


KINDS = {"ours": ours, "llama": llama}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--help"]:  # not argparse, whose import would add to the time
        print(__doc__)
        sys.exit()
    token = KINDS[sys.argv[1]](sys.argv[2])
    print(f"{time.process_time()} {token!r}", flush=True)
