"""Times the kernels of ``cuda-decoder`` against ONNX Runtime's CUDA provider, if this machine has a GPU.

``--backend auto`` chooses the kernels only on a GPU of the same name, and only if they gave the same tokens in less
time.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import DECODER
from blip2edge.errors import BackendError
from blip2edge.runtime.backends import probe
from blip2edge.runtime.backends.open_graph import GraphOpener
from blip2edge.runtime.cuda.backend import open_decoder
from blip2edge.runtime.decoding.decoder import decoder_of, token_table
from blip2edge.runtime.decoding.sampling import StepScores
from blip2edge.runtime.decoding.state import ChoosingState, Decoder

PROMPT, TOKENS, ROUNDS = 24, 16, 5


def timed_tokens(bundle: Bundle, directory: Path) -> tuple[float, float] | Literal["different"] | None:
    """Times the decoding of a text of random tokens, with ONNX Runtime and with the kernels in turn.

    Args:
        bundle: The bundle.
        directory: Directory with the decoder's layout and its compiled kernels.

    Returns:
        Milliseconds per token for ONNX Runtime and for the kernels: the median over several texts, prefill included.
        The word ``different`` if both chose different tokens. None if this machine has no GPU that runs both.
    """
    if not probe.nvidia_driver().gpus:
        return None
    try:
        with ExitStack() as stack:
            opener = GraphOpener(bundle, "cuda")
            stack.callback(opener.close)
            kernels = open_decoder(bundle, directory)
            stack.callback(kernels.close)
            return _raced([decoder_of(bundle, opener(DECODER)), decoder_of(bundle, kernels)], _prompt(bundle))
    except BackendError:  # one of them does not run here: nothing is measured, and `auto` does not choose the kernels
        return None


def _prompt(bundle: Bundle) -> Array:
    table = token_table(bundle)
    length = max(1, min(PROMPT, bundle.manifest.max_positions - TOKENS - 1))
    return table.rows(np.random.default_rng(0).integers(0, table.num_rows, length))


def _raced(decoders: list[Decoder], prompt: Array) -> tuple[float, float] | Literal["different"]:
    milliseconds: list[list[float]] = [[] for _ in decoders]
    for number in range(ROUNDS + 2):
        tokens = []
        for decoder, times in zip(decoders, milliseconds, strict=True):
            start = time.perf_counter()
            tokens.append(_decoded(decoder, prompt))
            if number > 1:  # the first text warms up, the second one captures
                times.append((time.perf_counter() - start) * 1e3 / TOKENS)
        if tokens[0] != tokens[1]:
            return "different"
    first, second = (statistics.median(times) for times in milliseconds)
    return first, second


def _decoded(decoder: Decoder, prompt: Array) -> list[int]:
    """Decodes :data:`TOKENS` tokens greedily; if the decoder can choose tokens on the GPU, they are chosen there."""
    logits, state = decoder.prefill([prompt])
    tokens = [int(logits[0].argmax())]
    last = np.array(tokens)
    if isinstance(state, ChoosingState) and state.gives_logprobs:
        steps = state.choose(last, [StepScores(np.zeros(0, np.int64), 1.0)])
        tokens += [int(next(steps)[0][0]) for _ in range(TOKENS - 1)]
        steps.close()
        return tokens
    for _ in range(TOKENS - 1):
        last = state.step(last).argmax(axis=-1)
        tokens.append(int(last[0]))
    return tokens
