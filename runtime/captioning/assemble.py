"""Loads the graphs and tokenizers of a bundle; contains the base class of ``Captioner`` and ``Matcher``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import NUMPY_DTYPES
from blip2edge.bundle.prompt_spec import PromptSpec
from blip2edge.bundle.schema import (
    BRIDGE,
    CROSS_KV,
    DECODER,
    QFORMER_TOKENIZER_FILE,
    TEXT_ENCODER,
    TOKENIZER_FILE,
    VISION,
    BackendName,
    DraftName,
)
from blip2edge.errors import Blip2EdgeError, BundleError, UsageError, option, shown
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.backends.open_graph import GraphOpener
from blip2edge.runtime.captioning.encoder import Encoder, ImageParts, TextParts
from blip2edge.runtime.captioning.pipeline import DecoderOnly, EncoderDecoder, LanguageModel, TextGenerator
from blip2edge.runtime.decoding.confidence import Confidence
from blip2edge.runtime.decoding.decoder import decoder_of, token_table
from blip2edge.runtime.decoding.draft_model import DraftSelector
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.text.prompt import InstructionTokenizer, PromptBuilder
from blip2edge.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

OpenGraph = Callable[[str], Session]
"""Type of a function that loads a graph of a bundle, given the graph's name."""


class LoadedBundle:
    """An opened bundle and the graphs that are loaded from it: the base of ``Captioner`` and ``Matcher``.

    Attributes:
        bundle: The bundle.
        graphs: Loads and closes the bundle's graphs.

    Raises:
        UsageError: ``bundle`` is a path, or something else that is not an opened bundle.
    """

    def __init__(self, bundle: Bundle, backend: BackendName, threads: int | None) -> None:
        given: Any = bundle
        if not isinstance(given, Bundle):
            directory = shown(given) if isinstance(given, (str, os.PathLike)) else "directory"
            raise UsageError(
                f"expected {option('bundle')} to be an opened Bundle, got {shown(given)}",
                f"load a directory with {type(self).__name__}.load({directory})",
            )
        self.bundle = bundle
        self.graphs = GraphOpener(bundle, backend, threads)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Closes the graphs if the block raises an error; else checks that no file changed during the block."""
        with self.graphs.closed_on_error():
            try:
                yield
            except Blip2EdgeError:
                self.bundle.checked.check_unchanged()  # a file that was changed meanwhile is the cause of the error
                raise
            self.bundle.checked.check_unchanged()

    def close(self) -> None:
        """Releases the graphs and their memory. A second call does nothing.

        First finish the running calls and close the schedulers. Later calls of other methods raise UsageError.
        """
        self.graphs.close()

    def __enter__(self) -> Self:
        """Returns the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Calls :meth:`close`."""
        self.close()

    def __repr__(self) -> str:
        values = f"{str(self.bundle.path)!r}, backend={self.graphs.backend!r}"
        state = ", closed" if self.graphs.closed else ""
        return f"{type(self).__name__}({values}, precision={self.bundle.manifest.precision!r}{state})"

    def _check_open(self) -> None:
        """Raises UsageError after :meth:`close`."""
        if self.graphs.closed:
            name = type(self).__name__
            raise UsageError(f"this {name} is closed", f"load the bundle again with {name}.load")


def image_parts(bundle: Bundle, open_graph: OpenGraph, limits: Limits = DEFAULT_LIMITS) -> ImageParts:
    """Loads the code and graphs that encode pictures: preprocessing, vision encoder, bridge (if there is one)."""
    return ImageParts(
        preprocessing=Preprocessing.from_json(bundle.manifest.preprocessing),
        pixels_dtype=NUMPY_DTYPES[bundle.graph(VISION).spec.inputs[0].dtype],
        vision=open_graph(VISION),
        bridge=open_graph(BRIDGE) if BRIDGE in bundle.manifest.graphs else None,
        limits=limits,
        elastic=bundle.manifest.elastic,
    )


def queries_of(bundle: Bundle) -> int | None:
    """Returns the largest number of visual tokens that the bridge makes from a picture; None without a bridge."""
    if BRIDGE not in bundle.manifest.graphs:
        return None
    count = bundle.graph(BRIDGE).spec.outputs[0].dims[1]
    return count if isinstance(count, int) else count.max


def captioning_prompt(bundle: Bundle) -> PromptSpec:
    """Returns a bundle's prompt template; raises BundleError if its model only matches pictures with texts."""
    spec = bundle.manifest.prompt
    if spec is None:
        raise BundleError(
            f"{bundle.path} compares pictures with texts and cannot caption them",
            "use match or embed instead",
        )
    return spec


def text_parts(bundle: Bundle) -> TextParts:
    """Loads the tokenizers and the prompt template, which encode prompts.

    Raises:
        BundleError: The bundle has no prompts, because its model only matches pictures with texts.
    """
    spec = captioning_prompt(bundle)
    tokenizer = Tokenizer.from_file(bundle.file(TOKENIZER_FILE), **bundle.manifest.tokenizer)
    prompts = PromptBuilder(spec, tokenizer, bundle.manifest.max_positions, token_table(bundle).num_rows)
    instructions = None
    if spec.instruction_positions:
        reader = Tokenizer.from_file(bundle.file(QFORMER_TOKENIZER_FILE))
        instructions = InstructionTokenizer(reader, spec.instruction_positions, spec.frames)
    return TextParts(tokenizer, prompts, instructions)


def load_language_model(bundle: Bundle, open_graph: Callable[[str], Session]) -> LanguageModel:
    """Loads a bundle's language model.

    Args:
        bundle: An opened bundle.
        open_graph: Loads a graph by name.
    """
    manifest = bundle.manifest
    decoder = decoder_of(bundle, open_graph(DECODER))
    cross_kv = open_graph(CROSS_KV) if CROSS_KV in manifest.graphs else None
    if TEXT_ENCODER not in manifest.graphs or cross_kv is None:
        source = bundle.graph(CROSS_KV).spec.inputs[0].name if cross_kv is not None else ""
        return DecoderOnly(decoder, cross_kv, source)
    start = manifest.generation["decoder_start_token_id"]
    takes = tuple(tensor.name for tensor in bundle.graph(TEXT_ENCODER).spec.inputs)
    return EncoderDecoder(decoder, open_graph(TEXT_ENCODER), takes, cross_kv, start)


def load_pipeline(
    bundle: Bundle, open_graph: OpenGraph, *, draft: DraftName, backend: str, limits: Limits = DEFAULT_LIMITS
) -> tuple[Encoder, TextGenerator]:
    """Loads a captioner's pipeline.

    Args:
        bundle: An opened bundle.
        open_graph: Loads a graph by its name.
        draft: The default draft model; see :class:`DraftSelector`.
        backend: Name of the backend that runs the graphs.
        limits: The largest picture or video that is decoded.

    Raises:
        BundleError: The bundle generates no captions, or one of its files cannot be used.
        UsageError: ``draft`` is unknown, or the bundle has no such draft model.
    """
    text = text_parts(bundle)
    language = load_language_model(bundle, open_graph)
    images = image_parts(bundle, open_graph, limits)
    drafts = DraftSelector.load(bundle, open_graph, text.tokenizer, draft, backend)
    # The text head needs the queries' keys and values as well.
    needed = None if drafts.head is not None else ["visual_tokens"]
    generator = TextGenerator(
        language, text.tokenizer, bundle.manifest.max_positions, drafts, Confidence(bundle.manifest), queries_of(bundle)
    )
    return Encoder(images, text, needed), generator
