"""Runs one of the compared programs in its own process and environment, and reports the time of each task.

    python benchmarks/worker.py KIND PATH

Reads one JSON list per line from stdin (``["run"]``, ``["prefill", 64]``, ``["decode", 64, 32]``), and answers each
with the process CPU seconds of the task, one number per line. Needs numpy and the packages of the program ``KIND``;
only the kind ``ours`` needs blip2edge.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blip2edge.runtime.decoding.state import RowState

SEED = 0


def timed(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


class Onnx:
    """Runs an ONNX graph with one float input, in ONNX Runtime with default options."""

    def __init__(self, path: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        value = self.session.get_inputs()[0]
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        self.feed = {value.name: np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)}

    def run(self) -> float:
        return timed(lambda: self.session.run(None, self.feed))


class OpenVino:
    """Runs an ONNX graph with one float input, in OpenVINO; in bfloat16 if ``path`` ends in ``:bf16``."""

    def __init__(self, path: str) -> None:
        import openvino

        path, _, precision = path.partition(":")
        hint = {"INFERENCE_PRECISION_HINT": precision or "f32"}
        options = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", **hint}
        self.request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
        shape = [size.get_length() if size.is_static else 1 for size in self.request.model_inputs[0].partial_shape]
        self.feed = [np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)]

    def run(self) -> float:
        return timed(lambda: self.request.infer(self.feed))


class Vision:
    """Runs a bundle's vision encoder with blip2edge's runtime."""

    def __init__(self, path: str) -> None:
        from blip2edge.bundle.bundle import Bundle
        from blip2edge.bundle.schema import VISION
        from blip2edge.runtime.backends.open_graph import GraphOpener

        bundle = Bundle.open(path)
        self.session = GraphOpener(bundle, "cpu", 1)(VISION)
        spec = bundle.graph(VISION).spec.inputs[0]
        shape = [size if isinstance(size, int) else 1 for size in spec.dims]
        self.feed = {spec.name: np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)}

    def run(self) -> float:
        return timed(lambda: self.session.run(self.feed))


class Ours:
    """Runs a bundle's decoder in blip2edge.

    If ``path`` ends in ``:portable``, the exported graph runs, else the optimized graph.
    """

    def __init__(self, path: str) -> None:
        from blip2edge.bundle.bundle import Bundle
        from blip2edge.bundle.schema import DECODER
        from blip2edge.runtime.backends.open_graph import GraphOpener
        from blip2edge.runtime.decoding.decoder import decoder_of

        path, _, portable = path.partition(":")
        bundle = Bundle.open(path)
        self.decoder = decoder_of(bundle, GraphOpener(bundle, "cpu", 1, portable=bool(portable))(DECODER))

    def start(self, prompt: int) -> tuple[NDArray[np.float32], RowState]:
        ids = np.random.default_rng(SEED).integers(5, 1000, prompt)
        return self.decoder.prefill([self.decoder.table.rows(ids)])

    def prefill(self, prompt: int) -> float:
        return timed(lambda: self.start(prompt))

    def decode(self, prompt: int, tokens: int) -> float:
        logits, state = self.start(prompt)

        def go() -> None:
            nonlocal logits
            for _ in range(tokens):
                logits = state.step(logits.argmax(axis=-1))

        return timed(go)


class Llama:
    """Runs a GGUF file in llama.cpp (``pip install xllamacpp``, which contains builds for all CPUs).

    Each prompt has new token ids, because llama.cpp's server reuses the cache of equal prompts. All texts have the
    given length in tokens.
    """

    def __init__(self, path: str) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
        for threads in (params.cpuparams, params.cpuparams_batch):
            threads.n_threads, threads.poll = 1, 0
        self.rng = np.random.default_rng(SEED)
        self.server = xllamacpp.Server(params)

    def go(self, prompt: int, tokens: int) -> float:
        request = {
            "prompt": self.rng.integers(5, 1000, prompt).tolist(), "n_predict": tokens, "ignore_eos": True,
            "temperature": 0.0, "top_k": 1, "samplers": ["top_k"], "cache_prompt": False,
        }  # fmt: skip
        answer: list[dict[str, Any]] = []
        took = timed(lambda: answer.append(self.server.handle_completions(request)))
        found = answer[0].get("tokens_predicted", answer[0].get("timings", {}).get("predicted_n"))
        assert found == tokens, answer[0]
        return took

    def prefill(self, prompt: int) -> float:
        return self.go(prompt, 1)

    def decode(self, prompt: int, tokens: int) -> float:
        return self.go(prompt, tokens + 1) - self.go(prompt, 1)


class Eager:
    """Runs a language model from a directory in transformers, with default options."""

    def __init__(self, path: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def start(self, prompt: int) -> Any:
        ids = np.random.default_rng(SEED).integers(5, 1000, prompt)
        with self.torch.no_grad():
            return self.model(input_ids=self.torch.from_numpy(ids)[None], logits_to_keep=1)

    def prefill(self, prompt: int) -> float:
        return timed(lambda: self.start(prompt))

    def decode(self, prompt: int, tokens: int) -> float:
        out = self.start(prompt)

        def go() -> None:
            nonlocal out
            with self.torch.no_grad():
                for _ in range(tokens):
                    chosen = out.logits[:, -1:].argmax(-1)
                    out = self.model(input_ids=chosen, past_key_values=out.past_key_values)

        return timed(go)


class Optimum(Eager):
    """Runs a language model exported by optimum-onnx, in optimum's own runtime class."""

    def __init__(self, path: str) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        torch.set_num_threads(1)
        self.torch = torch
        self.model = ORTModelForCausalLM.from_pretrained(path, session_options=options)

    def start(self, prompt: int) -> Any:
        ids = self.torch.from_numpy(np.random.default_rng(SEED).integers(5, 1000, prompt))[None]
        return self.model(input_ids=ids, attention_mask=self.torch.ones_like(ids), use_cache=True)

    def decode(self, prompt: int, tokens: int) -> float:
        out = self.start(prompt)

        def go() -> None:
            nonlocal out
            for step in range(tokens):
                mask = self.torch.ones((1, prompt + step + 1), dtype=self.torch.int64)
                chosen = out.logits[:, -1:].argmax(-1)
                out = self.model(
                    input_ids=chosen, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
                )

        return timed(go)


KINDS = {
    "onnx": Onnx, "openvino": OpenVino, "vision": Vision, "ours": Ours, "llama": Llama, "eager": Eager,
    "optimum": Optimum,
}  # fmt: skip


def main() -> None:
    if sys.argv[1:] == ["--help"]:
        print(__doc__)
        sys.exit()
    kind, path = sys.argv[1:]
    contestant = KINDS[kind](path if "://" in path else str(Path(path)))
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(getattr(contestant, name)(*arguments), flush=True)


if __name__ == "__main__":
    main()
