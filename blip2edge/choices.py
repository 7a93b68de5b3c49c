"""The allowed values of options that accept only a few names, for the code, the command line and the help.

Only the standard library is imported, because `--help` imports this module.
"""

from __future__ import annotations

from typing import Literal, get_args

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions of an export, and the dtype of the graphs' floating tensors."""

VERIFICATIONS = ("full", "sample")
"""How an export is compared with torch: the whole model, or some of its layers and shapes."""

RANGE_METHODS = ("entropy", "minmax", "percentile", "mse", "smooth")
"""How calibration chooses INT8 ranges: by the histogram alone, or (``smooth``) by the error of the layer's output."""

WEIGHT_BITS = {"int8": 8, "int4": 4}
"""Precisions of block-quantised weights, and the bits of a weight in each."""

FITTED_OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "queries",
    "repetition_penalty",
)
"""Generation options for which `calibrate --references` has a flag: a confidence is fitted with their values."""

COPIED_BACKENDS = ("cpu", "openvino", "cuda", "cuda-decoder")
"""Backends that have optimized copies."""

TENSORRT_EDITIONS = ("tensorrt", "rtx")
"""Products that build engines: TensorRT, and TensorRT for RTX."""

DECODER_CACHES = ("auto", "in-place", "constant", "concatenated")
"""KV cache of a decoder's engine: of constant capacity (updated in place, or copied in each step), or growing."""

TRAINING_STAGES = ("stage1", "stage2", "instruct")

METRICS = ("exact", "captions", "chair", "pope", "vqa", "retrieval", "clip", "reader")

METRIC_OF_SCORE = {
    **dict.fromkeys(
        ("cider", "cider_d", "bleu", *(f"bleu_{size}" for size in range(1, 5)), "rouge", "rouge_l"), "captions"
    ),
    **dict.fromkeys(("meteor", "spice", "caption"), "captions"),
    **dict.fromkeys(("vqa_accuracy", "vqav2", "accuracy"), "vqa"),
    **dict.fromkeys(("exact_match", "scenes"), "exact"),
    **dict.fromkeys(("recall", "itm", "itc"), "retrieval"),
    **dict.fromkeys(("clipscore", "clip_score", "refclipscore"), "clip"),
    **dict.fromkeys(("chairs", "chairi", "chair_s", "chair_i", "hallucination"), "chair"),
}
"""The metric of :data:`METRICS` that a user probably means by the name of a single score."""

NOT_COMPUTED = ("meteor", "spice")
"""Scores of captions that need Java, and are not computed."""

Ranking = Literal["probability", "lavis"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
"""Score by which the matching head ranks candidates in retrieval.

``probability``: the match probability. ``lavis``: the match logit plus the cosine, as in BLIP-2's original code.
"""

Split = Literal["heldout", "train"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""Splits of the generated scenes. ``heldout``: pairs of objects that training never uses; ``train``: all others."""

WEB, SYNTHETIC = "web", "synthetic"
KEEP = {"both": (WEB, SYNTHETIC), WEB: (WEB,), SYNTHETIC: (SYNTHETIC,)}
"""Which captions CapFilt may keep, by their origin."""

BULK_SOURCES = ("folder", "webdataset", "parquet", "csv")
"""Kinds of sources of `bulk`."""

BULK_FORMATS = ("parquet", "webdataset")
"""Formats that `bulk` writes."""
