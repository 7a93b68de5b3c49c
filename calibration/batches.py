"""Records the inputs of each graph of a bundle, while the preprocessing and the graphs run on pictures.

The inputs are saved to a directory, one file for each run. So memory does not grow with the number of pictures, and
every later step reads the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import IMAGE_FEATURES, ElasticSpec
from blip2edge.calibration.pictures import PictureSet
from blip2edge.progress import counted
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.bench.certificate.reference_outputs import default_prompt
from blip2edge.runtime.captioning.assemble import image_parts, load_language_model, text_parts
from blip2edge.runtime.captioning.pipeline import EncoderDecoder
from blip2edge.runtime.images.video import pictures_of
from blip2edge.runtime.text.prompt import Prompt, pack_images


class Feeds:
    """Stores the recorded inputs of each graph in files.

    Args:
        directory: The directory of the files; empty, or with the files that an earlier :class:`Feeds` wrote.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._counts = {folder.name: len(list(folder.glob("*.npz"))) for folder in directory.iterdir()}

    def add(self, graph: str, inputs: Mapping[str, Array]) -> None:
        """Appends the inputs of one run of a graph, by name."""
        at = self._counts.get(graph, 0)
        folder = self.directory / graph
        folder.mkdir(exist_ok=True)
        arrays: dict[str, Any] = dict(inputs)
        np.savez(folder / f"{at:06d}.npz", **arrays)
        self._counts[graph] = at + 1

    def count(self, graph: str) -> int:
        """Returns the number of recorded runs of a graph."""
        return self._counts.get(graph, 0)

    def runs(self, graph: str, count: int | None = None) -> Iterator[dict[str, Array]]:
        """Yields the recorded inputs of a graph, run by run, in order.

        Args:
            graph: Name of the graph.
            count: Largest number of runs; they are chosen at even distances. None for all runs.
        """
        total = self.count(graph)
        wanted = total if count is None else min(count, total)
        for index in range(wanted):
            with np.load(self.directory / graph / f"{index * total // wanted:06d}.npz") as arrays:
                yield dict(arrays)


class SubstituteSession:
    """A session with the same input and output names as another session; a function computes its results."""

    def __init__(self, like: Session, compute: Callable[[Mapping[str, Array]], dict[str, Array]]) -> None:
        self.input_names, self.output_names = like.input_names, like.output_names
        self._compute = compute

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Calls the function with the inputs; returns all outputs of the function, also if ``outputs`` names only some.

        See :class:`blip2edge.runtime.backends.base.Session`.
        """
        del outputs
        return self._compute(inputs)

    def close(self) -> None:
        """Does nothing: this session holds no memory to release."""


def collect(
    bundle: Bundle,
    pictures: PictureSet,
    feeds: Feeds,
    *,
    texts: Sequence[Sequence[int]] = (),
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs the graphs of a bundle on pictures and records the inputs of each graph.

    Args:
        bundle: The bundle that is calibrated.
        pictures: The pictures.
        feeds: Stores the recorded inputs.
        texts: Token ids of the captions of the first pictures: the decoder processes them after the prompt, in the
            same pass. If empty, no graph of the language model is run.
        threads: CPU threads; None for all cores.
        progress: Called with pictures done and pictures in all.
    """

    def open_graph(graph: str) -> Session:
        path = bundle.file(bundle.graph(graph).spec.file)
        session = OnnxRuntimeSession(path, threads)

        def compute(inputs: Mapping[str, Array]) -> dict[str, Array]:
            feeds.add(graph, inputs)
            return session.run(inputs)

        return SubstituteSession(session, compute)

    run = PictureRunner(bundle, open_graph, language=bool(texts))
    for done, picture in enumerate(counted(pictures, len(pictures), progress)):
        run(picture.image(), texts[done] if done < len(texts) else None)


class PictureRunner:
    """Runs the graphs of a bundle in their order, one picture at a time.

    Args:
        bundle: The bundle.
        session: Function that opens a graph by name.
        language: Whether the language model's graphs are run too.
    """

    def __init__(self, bundle: Bundle, session: Callable[[str], Session], *, language: bool) -> None:
        manifest = bundle.manifest
        self.images = image_parts(bundle, session)
        self.features = session(IMAGE_FEATURES) if IMAGE_FEATURES in manifest.graphs else None
        self.spec = manifest.prompt
        self.language = load_language_model(bundle, session) if language else None
        self.instruction: dict[str, Array] = {}
        self.prompt: Callable[[int | None], Prompt] | None = None
        self._queries = _numbers_of_queries(manifest.elastic)
        if self.spec is not None:
            text = text_parts(bundle)
            prompt = default_prompt(text.prompts)
            self.prompt = lambda queries: text.prompts(prompt, queries=queries)
            if text.instructions is not None:
                self.instruction = text.instructions([prompt])

    def __call__(self, picture: Image.Image, text: Sequence[int] | None) -> None:
        """Runs all graphs on a picture. The decoder runs on the prompt, followed by the tokens of ``text``.

        If the bridge works with several numbers of queries (elastic), the pictures use different numbers, so that the
        chosen ranges fit all of them.
        """
        queries = next(self._queries)
        images, frames = self.images, self.spec.frames if self.spec is not None else 1
        pixels = images.preprocessing.batch(pictures_of([picture], frames))
        outputs = images.vision.run({"pixel_values": pixels.astype(images.pixels_dtype, copy=False)})
        if images.bridge is not None:
            others = self.instruction | images.query_ids(len(pixels), queries)
            outputs |= images.bridge.run({"image_embeds": outputs["image_embeds"], **others})
        if self.features is not None:
            self.features.run({name: outputs[name] for name in self.features.input_names})
        if self.language is None or self.prompt is None or text is None:
            return
        if frames > 1:
            outputs = {name: pack_images(array, [frames]) for name, array in outputs.items()}
        prompt = self.prompt(queries)
        if isinstance(self.language, EncoderDecoder):
            _, state = self.language.prefill([prompt], outputs)
            behind = _behind(text, self.language.initial)
            if behind:
                state.extend(np.array([behind], np.int64))
        else:
            self.language.prefill([_continued(prompt, text)], outputs)


def _numbers_of_queries(elastic: ElasticSpec | None) -> Iterator[int | None]:
    """Yields the number of queries of each picture; None if the bridge always uses all queries (not elastic).

    Every second picture uses all queries. The other pictures use each allowed number in turn.
    """
    if elastic is None:
        return repeat(None)
    least, most = elastic.min_queries, elastic.max_queries
    return (most if at % 2 == 0 else least + at // 2 % (most + 1 - least) for at in count())


def _behind(text: Sequence[int], start: Sequence[int]) -> Sequence[int]:
    """Returns the generated ids without the start tokens, with which the texts of encoder-decoder models begin."""
    return text[len(start) :] if tuple(text[: len(start)]) == tuple(start) else text


def _continued(prompt: Prompt, text: Sequence[int]) -> Prompt:
    """Returns a prompt that is followed by the token ids of a caption."""
    segments = (*prompt.segments[:-1], (*prompt.segments[-1], *text))
    attends_to = (*prompt.attends_to, *[prompt.attends_to[-1]] * len(text)) if prompt.attends_to else ()
    return replace(prompt, segments=segments, attends_to=attends_to)
