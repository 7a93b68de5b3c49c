"""Compares a calibrated bundle with the original bundle: cosines of the graphs' outputs, agreement of the captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.schema import GraphSpec
from blip2edge.calibration.batches import Feeds
from blip2edge.calibration.pictures import CalibrationPicture
from blip2edge.errors import BundleError, option
from blip2edge.progress import counted
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.bench.certificate.reference_outputs import default_prompt
from blip2edge.runtime.captioning.captioner import Captioner

RUNS = 32
"""Number of recorded inputs whose outputs are compared, and number of pictures whose captions are compared."""


@dataclass(frozen=True)
class Cosine:
    """Cosine similarity between an output of the quantized graph and the same output of the original graph.

    Attributes:
        mean: Mean of the cosines of whole tensors, one per run.
        lowest: The lowest cosine of a whole tensor.
        lowest_token: The lowest cosine of a single vector along the last axis.
    """

    mean: float
    lowest: float
    lowest_token: float

    def to_json(self) -> dict[str, float]:
        """Returns the three cosines as a JSON object for ``bundle.json``."""
        return {name: round(value, 6) for name, value in vars(self).items()}


@dataclass(frozen=True)
class GreedyCaption:
    """The caption of a picture by greedy decoding.

    Attributes:
        tokens: Token ids.
        text: The caption as text.
    """

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class CaptionAgreement:
    """Compares the captions of a calibrated bundle with those of the original bundle, for the same pictures.

    Attributes:
        pictures: Number of pictures.
        same: Share of the pictures for which both captions have equal token ids.
        parent: Captions of the original bundle, as text.
        ours: Captions of the calibrated bundle, as text.
    """

    pictures: int
    same: float
    parent: tuple[str, ...]
    ours: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for ``bundle.json``.

        It has the number of pictures, the share of equal captions, and the pairs of texts that differ.
        """
        pairs = zip(self.parent, self.ours, strict=True)
        differing = [list(pair) for pair in pairs if pair[0] != pair[1]]
        return {"pictures": self.pictures, "same": round(self.same, 4), "differing": differing}


def cosine_similarity(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Computes the cosine of two arrays, which are flattened to vectors; 1 if both are zero."""
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale else float(not a.any() and not b.any())


def compare_graphs(
    spec: GraphSpec,
    parent: Path,
    ours: Path,
    feeds: Feeds,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Cosine]:
    """Runs the original graph and the quantized graph on the same recorded inputs, and compares their outputs.

    Args:
        spec: Inputs and outputs of the graph.
        parent: File of the original graph.
        ours: File of the quantized graph.
        feeds: The recorded inputs; at most :data:`RUNS` of them are run.
        threads: CPU threads; None for all cores.
        progress: Called with runs done and runs in all.

    Returns:
        The cosine of each floating output, by name. The keys and values that the decoder adds to its KV cache are not
        compared: an error in them also shows in the logits.

    Raises:
        BundleError: The quantized graph gives values that are not finite.
    """
    outputs = [
        tensor.name for tensor in spec.outputs if "float" in tensor.dtype and not tensor.name.startswith("present.")
    ]
    session = OnnxRuntimeSession(parent, threads)
    wanted = [session.run(inputs, outputs) for inputs in feeds.runs(spec.name, RUNS)]
    session.close()  # only one graph at a time is in memory
    session = OnnxRuntimeSession(ours, threads)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in outputs}
    expected = zip(feeds.runs(spec.name, RUNS), wanted, strict=True)
    for inputs, parents in counted(expected, len(wanted), progress):
        got = session.run(inputs, outputs)
        for name in outputs:
            if not np.isfinite(got[name]).all():
                raise BundleError(
                    f"the output {name} of the quantized graph {spec.name} contains NaN or infinity",
                    f"calibrate with another {option('method')} or {option('weights')}, or a bundle in fp32",
                )
            runs[name].append((cosine_similarity(parents[name], got[name]), _lowest_token(parents[name], got[name])))
    session.close()
    return {name: _summary(pairs) for name, pairs in runs.items() if pairs}


def _lowest_token(first: NDArray[Any], second: NDArray[Any]) -> float:
    a = first.astype(np.float64).reshape(-1, first.shape[-1])
    b = second.astype(np.float64).reshape(-1, first.shape[-1])
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.where(scale > 0, (a * b).sum(axis=1) / np.maximum(scale, 1e-30), 1.0).min())


def _summary(pairs: Sequence[tuple[float, float]]) -> Cosine:
    whole, tokens = zip(*pairs, strict=True)
    return Cosine(float(np.mean(whole)), min(whole), min(tokens))


def caption_pictures(
    bundle: str | Path,
    pictures: Sequence[CalibrationPicture],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[GreedyCaption]:
    """Captions pictures greedily with a bundle, on the CPU; returns the captions in the order of the pictures."""
    captioner = Captioner.load(bundle, backend="cpu", threads=threads)
    prompt = default_prompt(captioner.prompts)
    results = (captioner.caption(one.image(), prompt=prompt) for one in counted(pictures, len(pictures), progress))
    return [GreedyCaption(tuple(result.tokens), result.text) for result in results]


def compare_captions(parent: Sequence[GreedyCaption], ours: Sequence[GreedyCaption]) -> CaptionAgreement:
    """Compares the captions of the original bundle (``parent``) and of the calibrated bundle (``ours``)."""
    same = [one.tokens == two.tokens for one, two in zip(parent, ours, strict=True)]
    return CaptionAgreement(
        len(same), float(np.mean(same)), tuple(one.text for one in parent), tuple(one.text for one in ours)
    )
