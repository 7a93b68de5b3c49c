"""``blip2edge match`` and ``blip2edge embed``."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

from blip2edge.cli.files import write
from blip2edge.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from blip2edge.runtime.captioning.matcher import Matcher, MatchResult


def match(options: argparse.Namespace) -> int:
    """Compare every picture with every text, in the order given."""
    images: list[str] = options.images
    many = len(images) > 1 or len(options.text) > 1
    for result in _load(options).match_many(images, options.text, batch_size=options.batch_size):
        label = f"{result.image}: {result.text}: " if many else ""
        print(json.dumps(result.to_json()) if options.json else f"{label}{_scores(result)}", flush=True)
    return 0


def embed(options: argparse.Namespace) -> int:
    """Print or write the vectors of pictures or of texts."""
    if bool(options.images) == bool(options.text):
        raise UsageError("either pictures or --text is expected", "leave one of the two out")
    matcher = _load(options)
    if options.text:
        vectors = matcher.embed_texts(options.text, batch_size=options.batch_size)
    else:
        vectors = matcher.embed_images(options.images, batch_size=options.batch_size)
    if options.output is not None:
        import numpy as np

        file = io.BytesIO()
        np.save(file, vectors)
        write(options.output, file.getvalue(), "--output")
        print(f"{options.output}: {vectors.dtype} {list(vectors.shape)}")
        return 0
    kind = "text" if options.text else "image"
    for source, vector in zip(options.text or options.images, vectors, strict=True):
        print(json.dumps({kind: source, "embedding": vector.tolist()}), flush=True)
    return 0


def _scores(result: MatchResult) -> str:
    """Both scores, or the one that the model gives."""
    cosine = f"cosine {result.cosine:.4f}"
    return cosine if result.probability is None else f"probability {result.probability:.4f}, {cosine}"


def _load(options: argparse.Namespace) -> Matcher:
    from blip2edge.runtime.captioning.matcher import Matcher

    return Matcher.load(options.bundle, backend=options.backend, threads=options.threads)
