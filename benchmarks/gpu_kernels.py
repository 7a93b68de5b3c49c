"""Part 3 of the steps of ``gpu.py``: the decoder in CUDA kernels (``--backend cuda-decoder``).

The steps need the driver, ``cuda-bindings`` and ONNX Runtime for the CPU. A machine without a network gets the folder
``build/gpu-kernels`` of ``gpu_prepare.py``: the bundles of the example checkpoint with their compiled kernels, and the
kernels for the sizes of OPT-2.7b. Without that folder the steps make these files themselves, which needs NVRTC and the
packages of an export.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import KERNELS, prepared
from kernel_speed import OPT_2_7B, PLAIN, kernels_of
from reporting import ROOT

from blip2edge.runtime.cuda.kernel import Kernel
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.sampling import Draws, StepScores, draw

PRECISIONS = ("fp16", "int4")
LEAST_EQUAL = 0.999
"""Share of the tokens that must be equal; the others may differ where two logits are nearly equal."""

LARGEST_GAP = 0.01
"""A text of a beam search may differ from that of the CPU if its score is at most this far from the CPU's score, as a
share of the CPU's score: two beams are then nearly equal, and rounding decides between them."""

LEAST_SHARE = {"16 bits": 0.85, "4 bits": 0.70}
"""Share of the measured bandwidth that a decode step should reach."""


def prepare_bundles(folder: Path) -> None:
    """Exports the example checkpoint in each of :data:`PRECISIONS`, and compiles the kernels of these bundles."""
    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.export.pipeline import export_checkpoint
    from blip2edge.optimization.pipeline import optimize

    folder.mkdir(parents=True, exist_ok=True)
    examples = ROOT / "examples"
    export_checkpoint(examples / "checkpoint", folder / "fp16", precision="fp16", force=True)
    calibrate(
        folder / "fp16", folder / "int4", images=examples / "pictures", activations=(), weights="int4", force=True,
        formats=("decoder:*head*=int8",),  # its vocabulary is odd, and rows of 4-bit values begin at bytes
    )  # fmt: skip
    for precision in PRECISIONS:
        optimize(folder / precision, "cuda-decoder")


def prepare_cubins(folder: Path) -> None:
    """Compiles the kernels of a decoder with the sizes of OPT-2.7b, for every supported GPU."""
    from blip2edge.runtime.cuda.compilation.compiler import compile_kernels, supported_targets
    from blip2edge.runtime.cuda.copy_files import cubin_name

    folder.mkdir(parents=True, exist_ok=True)
    for target in supported_targets():
        (folder / cubin_name(target)).write_bytes(compile_kernels(kernels_of(OPT_2_7B), target))


def _simulate_nvrtc() -> None:
    """Replaces NVRTC and the CUDA driver by simulated ones, for a dry run.

    Every compiled file (cubin) is then empty, and the simulated driver runs the kernels that were compiled last.
    """
    from blip2edge.optimization.cuda_kernels import compiled as making
    from blip2edge.runtime.backends import probe
    from blip2edge.runtime.cuda import backend
    from blip2edge.runtime.cuda.compilation import compiler
    from tests.runtime.cuda.fake_driver import CUBIN, FakeDriver

    compiled: dict[str, Kernel] = {}

    def compile_kernels(kernels: Iterable[Kernel], capability: int) -> bytes:  # noqa: ARG001 - as the real one
        compiled.update({kernel.name: kernel for kernel in kernels})
        return CUBIN

    simulated: dict[str, Any] = {
        "supported_targets": lambda: (87,),
        "compile_kernels": compile_kernels,
        "check_usage": lambda *_: None,
    }
    for name, function in simulated.items():
        setattr(making, name, function)
    compiler.supported_targets, compiler.compile_kernels = simulated["supported_targets"], compile_kernels
    simulated_driver: Any = backend
    simulated_driver.load_driver = lambda: FakeDriver(list(compiled.values()))
    probe.nvidia_driver = lambda: probe.Driver("13.0")


def kernel_ids(dry: bool) -> dict[str, Any]:
    """Compares tokens that the kernels choose on the GPU with those of the portable graph on the CPU.

    The model is the example checkpoint, decoded greedily. The graph gets the GPU's earlier tokens as input, so that a
    different token does not change the tokens after it. Where the two choose different tokens, ``margins`` has the
    difference between the graph's logits of the two tokens, as a share of the largest logit.
    """
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.schema import DECODER
    from blip2edge.runtime.cuda.backend import open_decoder
    from blip2edge.runtime.decoding.decoder import decoder_of, token_table
    from tests.runtime.cuda.portable import Portable

    found: dict[str, Any] = {}
    if dry:
        _simulate_nvrtc()
    with prepared(KERNELS, dry, prepare_bundles) as folder:
        for precision in PRECISIONS:
            bundle = Bundle.open(folder / precision)
            session = open_decoder(bundle, folder / precision / "optimized" / "cuda-decoder")
            ours = decoder_of(bundle, session)
            theirs = decoder_of(bundle, Portable(bundle.file(f"{DECODER}.onnx")))
            table, random = token_table(bundle), np.random.default_rng(0)
            equal = 0
            margins: list[float] = []
            for _ in range(1 if dry else 8):
                lengths = random.integers(3, 20, 2 if dry else 8)
                prompts = [table.rows(random.integers(4, table.num_rows, length)) for length in lengths]
                same, far = _compared(ours.prefill(prompts), theirs.prefill(prompts), 3 if dry else 30)
                equal, margins = equal + same, margins + far
            session.close()
            total = equal + len(margins)
            found[precision] = {"equal": equal, "of": total, "margins": margins, "share": equal / total}
    return {"tokens": found, "ok": found["fp16"]["share"] >= LEAST_EQUAL}


def _compared(ours: Any, theirs: Any, steps: int) -> tuple[int, list[float]]:
    """Returns how many tokens are equal, and, for each other token, how far apart the graph's two logits are.

    This distance is the difference between the logits of the graph's token and the kernels' token, as a share of the
    largest logit.
    """
    (first, state), (logits, oracle) = ours, theirs
    rows = len(first)
    tokens = first.argmax(axis=-1)
    greedy = state.choose(tokens, PLAIN * rows)
    equal, margins = 0, []
    for step in range(steps + 1):
        if step:
            logits = oracle.step(tokens)
            tokens = next(greedy)[0]
        best = logits.argmax(axis=-1)
        for row in range(rows):
            if best[row] == tokens[row]:
                equal += 1
            else:
                gap = logits[row, best[row]] - logits[row, tokens[row]]
                margins.append(float(gap / np.abs(logits[row]).max()))
    greedy.close()
    return equal, margins


def kernel_draws(dry: bool) -> dict[str, Any]:
    """Compares tokens that the kernels draw on the GPU with those that the host draws from the kernels' own logits.

    The random numbers are the same. The host's draw gets the tokens of the GPU as earlier tokens, so that a different
    token does not change the tokens after it. All tokens must be drawn on the GPU.
    """
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.runtime.cuda.backend import open_decoder
    from blip2edge.runtime.decoding.decoder import decoder_of, token_table

    found: dict[str, dict[str, int]] = {}
    steps, rows = (4, 2) if dry else (30, 8)
    if dry:
        _simulate_nvrtc()
    with prepared(KERNELS, dry, prepare_bundles) as folder:
        bundle = Bundle.open(folder / PRECISIONS[0])
        session = open_decoder(bundle, folder / PRECISIONS[0] / "optimized" / "cuda-decoder")
        decoder, table, random = decoder_of(bundle, session), token_table(bundle), np.random.default_rng(1)
        prompts = [table.rows(random.integers(4, table.num_rows, length)) for length in random.integers(3, 20, rows)]
        for name, (temperature, top_k, top_p) in DRAWN.items():
            rules = [
                StepScores(np.zeros(0, np.int64), draws=Draws(temperature, top_k, top_p, random.random(steps)))
                for _ in range(rows)
            ]
            found[name] = _drawn(decoder, prompts, rules)
        session.close()
    return {"draws": found, "ok": all(drawn_well(one, rows * steps) for one in found.values())}


def drawn_well(found: Mapping[str, int], tokens: int) -> bool:
    """Returns whether the GPU drew all tokens itself, and enough of them equal those of the host."""
    whole = found["of"] == tokens and found["left_to_host"] == 0
    return whole and found["equal"] >= LEAST_EQUAL * tokens


DRAWN = {"temperature": (0.8, 0, 1.0), "top-k": (1.0, 20, 1.0), "top-p": (0.9, 0, 0.7), "both": (1.2, 50, 0.9)}
"""Temperature, top-k (0: all tokens) and top-p (1: all tokens) of each comparison."""


def _drawn(decoder: Any, prompts: list[Any], rules: list[StepScores]) -> dict[str, int]:
    """Counts the tokens that kernels and host draw equally, and the rows whose draws the kernels left to the host."""
    (first, state), (_, other) = decoder.prefill(prompts), decoder.prefill(prompts)
    tokens = first.argmax(axis=-1)
    drawing = state.choose(tokens, rules)
    equal = total = left = 0
    for step in range(len(rules[0].draws.uniforms) if rules[0].draws else 0):
        logits, chosen = other.step(tokens), next(drawing, None)
        if chosen is None:
            left = len(rules)
            break
        tokens = chosen[0]
        for row, rule in enumerate(rules):
            one = rule.draws
            stream = np.random.default_rng(0) if one is None else Number(float(one.uniforms[step]))
            given = (None, None, None) if one is None else (one.temperature, one.top_k, one.top_p)
            equal += int(draw(logits[row], stream, *given) == tokens[row])
            total += 1
    drawing.close()
    return {"equal": equal, "of": total, "left_to_host": left}


@dataclass(frozen=True)
class Number:
    """Stands in for a random generator: every draw gives the same number."""

    value: float

    def random(self) -> float:
        """Returns the number."""
        return self.value


def kernel_beams(dry: bool) -> dict[str, Any]:
    """Searches with beams on the GPU and on the CPU, and counts the pictures with equal tokens.

    ``gaps`` has, for each picture with other tokens, the difference of the two scores as a share of the CPU's score;
    at most :data:`LARGEST_GAP` is allowed, for at most half of the pictures. ``moves`` is how often the cache was
    copied: once for a batch of prompts of different lengths, never for one prompt.
    """
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.schema import DECODER
    from blip2edge.runtime.cuda.backend import open_decoder
    from blip2edge.runtime.cuda.decoding.decoder import KernelDecoder
    from blip2edge.runtime.decoding.beam_search import beam_search
    from blip2edge.runtime.decoding.decoder import decoder_of, token_table
    from blip2edge.runtime.decoding.options import GenerationOptions
    from tests.runtime.cuda.portable import Portable

    options = GenerationOptions(max_new_tokens=4 if dry else 20, num_beams=3)
    if dry:
        _simulate_nvrtc()
    with prepared(KERNELS, dry, prepare_bundles) as folder:
        bundle = Bundle.open(folder / PRECISIONS[0])
        session = open_decoder(bundle, folder / PRECISIONS[0] / "optimized" / "cuda-decoder")
        kernels = decoder_of(bundle, session)
        decoders = kernels, decoder_of(bundle, Portable(bundle.file(f"{DECODER}.onnx")))
        table, random, total = token_table(bundle), np.random.default_rng(2), 0
        gaps: list[float] = []
        for rows in (1, 1 if dry else 4):
            lengths = [9] if rows == 1 else random.integers(3, 20, rows).tolist()
            prompts = [table.rows(random.integers(4, table.num_rows, length)) for length in lengths]
            ours, theirs = (beam_search(*one.prefill(prompts), [[5]] * rows, options) for one in decoders)
            gaps += score_gaps(ours, theirs)
            total += rows
        moves = kernels.kernels.moves if isinstance(kernels, KernelDecoder) else 0
        session.close()
    ok = near_enough(gaps, total) and moves <= 1
    return {"equal": total - len(gaps), "of": total, "gaps": gaps, "moves": moves, "ok": ok}


def near_enough(gaps: Sequence[float], pictures: int) -> bool:
    """Returns whether at most half of the pictures have other tokens, all of them with nearly the CPU's score."""
    return 2 * len(gaps) <= pictures and all(gap <= LARGEST_GAP for gap in gaps)


def score_gaps(ours: Sequence[Generated], theirs: Sequence[Generated]) -> list[float]:
    """Returns the differences of the scores of texts with other tokens, as shares of the scores of ``theirs``.

    A missing score gives infinity.
    """
    gaps = []
    for one, other in zip(ours, theirs, strict=True):
        if one.tokens != other.tokens:
            if one.score is None or not other.score:
                gaps.append(math.inf)
            else:
                gaps.append(abs(one.score - other.score) / abs(other.score))
    return gaps


def kernel_speed(dry: bool) -> dict[str, Any]:
    """Runs ``kernel_speed.py`` in a process of its own; returns its result.

    In ``ok``, the result says whether each step reaches its share of the bandwidth (:data:`LEAST_SHARE`).
    """
    if dry:
        _simulate_nvrtc()
    with prepared(KERNELS, dry, prepare_cubins) as folder:
        script = Path(__file__).with_name("kernel_speed.py")
        words = [sys.executable, str(script), str(folder), *(["--dry-run"] if dry else [])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    reached = (found[name]["share_of_bandwidth"] >= share for name, share in LEAST_SHARE.items())
    return {**found, "ok": dry or all(reached)}


def prepare(folder: Path, targets: Sequence[int] | None = None) -> None:
    """Writes the files that both steps need.

    Args:
        folder: The directory that is written.
        targets: Compute capabilities, 90 for 9.0; None for all that are supported.
    """
    from blip2edge.runtime.cuda.compilation import compiler

    if targets:
        named: Any = compiler
        named.TARGETS = tuple(targets)
    prepare_bundles(folder)
    prepare_cubins(folder)
