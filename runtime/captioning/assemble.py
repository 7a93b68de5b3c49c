"""Assembles a pipeline: loads the parts that a bundle's manifest requires. All commands use this module."""

from __future__ import annotations

from collections.abc import Callable

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import NUMPY_DTYPES
from blip2edge.bundle.schema import BRIDGE, QFORMER_TOKENIZER_FILE, TOKENIZER_FILE, VISION, DraftName
from blip2edge.errors import BundleError
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.captioning.pipeline import Encoder, ImageParts, TextGenerator, TextParts
from blip2edge.runtime.decoding.draft_model import DraftSelector
from blip2edge.runtime.decoding.language_model import load_language_model, token_table
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.text.prompt import InstructionTokenizer, PromptBuilder
from blip2edge.runtime.text.tokenizer import Tokenizer

OpenGraph = Callable[[str], Session]
"""Loads a graph of a bundle by its name."""


def image_parts(bundle: Bundle, open_graph: OpenGraph) -> ImageParts:
    """Preprocessing, vision encoder and, where there is one, the bridge."""
    return ImageParts(
        preprocessing=Preprocessing.from_json(bundle.manifest.preprocessing),
        pixels_dtype=NUMPY_DTYPES[bundle.graph(VISION).spec.inputs[0].dtype],
        vision=open_graph(VISION),
        bridge=open_graph(BRIDGE) if BRIDGE in bundle.manifest.graphs else None,
    )


def text_parts(bundle: Bundle) -> TextParts:
    """Tokenizers and prompts.

    Raises:
        BundleError: The bundle matches pictures and texts, and has no prompts.
    """
    spec = bundle.manifest.prompt
    if spec is None:
        raise BundleError(
            f"{bundle.path} compares pictures with texts and cannot caption them",
            "use match or embed instead",
        )
    tokenizer = Tokenizer.from_file(bundle.file(TOKENIZER_FILE))
    prompts = PromptBuilder(spec, tokenizer, bundle.manifest.max_positions, token_table(bundle).num_rows)
    instructions = None
    if spec.instruction_positions:
        reader = Tokenizer.from_file(bundle.file(QFORMER_TOKENIZER_FILE))
        instructions = InstructionTokenizer(reader, spec.instruction_positions, spec.frames)
    return TextParts(tokenizer, prompts, instructions)


def load_pipeline(
    bundle: Bundle, open_graph: OpenGraph, *, draft: DraftName, backend: str
) -> tuple[Encoder, TextGenerator]:
    """Loads a captioner's pipeline.

    Args:
        bundle: An opened bundle.
        open_graph: Loads a graph by its name.
        draft: Draft model of texts that name none; see :class:`DraftSelector`.
        backend: Of the graphs.

    Raises:
        BundleError: The bundle captions nothing, or a file of it cannot be used.
        UsageError: ``draft`` is unknown, or the bundle has no such draft model.
    """
    text = text_parts(bundle)
    language = load_language_model(bundle, open_graph)
    images = image_parts(bundle, open_graph)
    drafts = DraftSelector.load(bundle, open_graph, text.tokenizer, draft, backend)
    # The text head needs the queries' keys and values as well.
    needed = None if drafts.head is not None else ["visual_tokens"]
    generator = TextGenerator(language, text.tokenizer, bundle.manifest.max_positions, drafts)
    return Encoder(images, text, needed), generator
