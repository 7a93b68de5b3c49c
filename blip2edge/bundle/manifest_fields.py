"""The fields of ``bundle.json``, ``optimized.json`` and ``engine.json``: the type and range of each value.

:func:`disagreements` compares the sizes in ``bundle.json`` with the inputs and outputs of its graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from blip2edge.bundle.fields import (
    FILE_RECORD,
    MAX_BYTES,
    Check,
    any_object,
    check_that,
    either,
    file_name,
    finite_number,
    flag,
    full_match,
    list_of,
    mapped,
    nullable,
    one_of_texts,
    record,
    sha256,
    text,
    whole,
)
from blip2edge.bundle.prompt_spec import INTERLEAVED, PROMPT_KINDS, TURNS, PromptSpec
from blip2edge.bundle.schema import (
    BRIDGE,
    CROSS_MASKS,
    DECODER,
    DTYPES,
    QUERY_IDS,
    VISION,
    Axis,
    CacheSpec,
    ElasticSpec,
    GraphSpec,
    TensorSpec,
)
from blip2edge.limits import MAX_SIDE

CAPTION, ASK = "caption", "ask"
"""Tasks for which ``calibrate --references`` fits a confidence (docs/confidence.md): captions, answers to questions."""

MAX_LENGTH = 1 << 31  # of an axis: ONNX Runtime and TensorRT count with 32 bits in places
MAX_TOKENS = 1 << 24  # of a vocabulary or a context; the largest vocabularies have 2^18, the longest contexts 2^23
MAX_LAYERS = 4096
MAX_WIDTH = 1 << 20
MAX_RANK = 8
FLOATS = ("float32", "float16", "bfloat16")
PAST = "past_key_values."

name: Check = full_match(r"[\w.+-]{1,200}", "a name of letters, digits, dots, dashes and underscores")
token_id: Check = nullable(whole(-1, MAX_TOKENS))  # -1: LLaMA's padding
precision: Check = full_match(r"[\w-]{1,40}", "the name of a precision, such as fp32")

_LENGTH = whole(0, MAX_LENGTH)
_AXIS = either(
    "size",
    record({"size": whole(1, MAX_LENGTH)}),
    record(
        {"name": full_match(r"[\w +]{1,200}", "the name of an axis"), "min": _LENGTH, "opt": _LENGTH, "max": _LENGTH}
    ),
)
TENSOR = record({"name": name, "dtype": one_of_texts(*DTYPES), "axes": list_of(_AXIS, most=MAX_RANK)})
TENSORS = {"inputs": list_of(TENSOR, least=1), "outputs": list_of(TENSOR, least=1)}

PARITY = record(
    {"output": name, "max_difference": finite_number(0), "relative": finite_number(0), "tolerance": finite_number(0)},
    {"cases": list_of(text), "sample": text},
)

GRAPH = record(
    {"precision": precision, **TENSORS},
    {
        "file": file_name,
        "data_files": list_of(file_name),
        "fp32_exceptions": list_of(text),
        "parity": list_of(PARITY),
    },
)

_CACHE = {"num_layers": whole(1, MAX_LAYERS), "num_heads": whole(1, MAX_LAYERS), "head_dim": whole(1, MAX_WIDTH)}
_TOKEN = whole(0, MAX_TOKENS)
_COSINE = nullable(finite_number())

PROMPT = record(
    {"template": text, "question": text, "visual_tokens": _TOKEN, "bos_token_id": token_id},
    {
        "image_token_id": token_id,
        "framed": flag,
        "required": flag,
        "default": nullable(text),
        "frames": whole(1, MAX_TOKENS),
        "instruction_positions": _TOKEN,
        "picture_token": text,
        "around_picture": text,
        "end_token_id": token_id,
        "image_token": text,
        "kind": one_of_texts(*PROMPT_KINDS),
        "turns": mapped(one_of_texts(*TURNS), text),
    },
)

_EDGE = whole(1, MAX_SIDE)
_SQUARE = record({"height": _EDGE, "width": _EDGE}, closed=True)
_CHANNELS = list_of(finite_number(), 3, 3)

PREPROCESSING = record(
    {},
    {
        "resize": flag,
        "size": either("shortest_edge", record({"shortest_edge": _EDGE}, closed=True), _SQUARE),
        "crop": nullable(_SQUARE),
        "resample": whole(0, 5),
        "do_rescale": flag,
        "rescale_factor": finite_number(),
        "do_normalize": flag,
        "mean": _CHANNELS,
        "std": _CHANNELS,
        "rescale_first": flag,
    },
    closed=True,
)

GENERATION = record(
    {},
    {
        "eos_token_ids": list_of(whole(-1, MAX_TOKENS)),
        "stop": list_of(text),
        "pad_token_id": token_id,
        "decoder_start_token_id": token_id,
        "max_new_tokens": whole(1, MAX_LENGTH),
    },
)

_COSINES = mapped(text, mapped(text, record({"mean": finite_number()})))
_AGREEMENT = record({"same": finite_number(0, 1), "pictures": _TOKEN})
CALIBRATION = record({"method": text, "pictures": _TOKEN, "cosine": _COSINES}, {"captions": nullable(_AGREEMENT)})
"""Checks the field ``calibration`` of ``bundle.json``, but only the values that the command `inspect` shows."""

_SHARE = finite_number(0, 1)
_MAP = record(
    {
        "task": one_of_texts(CAPTION, ASK),
        "prompt": nullable(text),
        "options": any_object,
        "precisions": mapped(text, precision),
        "max_new_tokens": whole(1, MAX_LENGTH),
        "offset": finite_number(),
        "weights": list_of(finite_number(), 3, 3),
        "knots": list_of(list_of(finite_number(), 0, 4096), 2, 2),
        "bounds": list_of(_SHARE, 2, 2),
        "kind": text,
        "right_if": text,
        "pictures": whole(0, MAX_LENGTH),
    },
    rules=(
        check_that(lambda value: len(value["knots"][0]) == len(value["knots"][1]), "knots of equal number"),
        check_that(lambda value: all(list(side) == sorted(side) for side in value["knots"]), "ascending knots"),
    ),
)
"""A map from log-probabilities to confidence, which `calibrate --references` writes into ``bundle.json``.

The measured values of the fit, such as its calibration error, are not checked.
"""

MANIFEST_FIELDS = record(
    {
        "family": name,
        "source": mapped(text, text),
        "precision": precision,
        "verify": text,
        "graphs": mapped(full_match(r"\w{1,100}", "the name of a graph"), GRAPH),
        "cache": nullable(record(_CACHE, closed=True)),
        "max_positions": whole(1, MAX_TOKENS),
        "vocab_size": whole(1, MAX_TOKENS),
        "preprocessing": PREPROCESSING,
        "prompt": nullable(PROMPT),
        "generation": GENERATION,
        "files": mapped(file_name, FILE_RECORD),
        "versions": mapped(text, text),
    },
    {
        "cross": nullable(
            record(
                {**_CACHE, "source_dim": whole(1, MAX_WIDTH)},
                {"mask": one_of_texts(*CROSS_MASKS), "source": name},
                closed=True,
            )
        ),
        "draft": nullable(
            record(
                {**_CACHE, "dec_token_id": _TOKEN, "end_token_id": _TOKEN, "max_positions": whole(1, MAX_TOKENS)},
                closed=True,
            )
        ),
        "calibration": lambda value, where: CALIBRATION(value, where) if value else any_object(value, where),
        "merging": nullable(
            record(
                {"merge_tokens": _TOKEN, "embeds": _TOKEN, "embeds_before": _TOKEN},
                {"output": text, "cosine": _COSINE, "lowest": _COSINE, "pictures": _TOKEN},
                closed=True,
            )
        ),
        "elastic": nullable(
            record({"min_queries": whole(1, MAX_TOKENS), "max_queries": whole(1, MAX_TOKENS)}, closed=True)
        ),
        "tokenizer": record({}, {"clean_up_tokenization_spaces": flag, "split_special_tokens": flag}, closed=True),
        "confidence": mapped(one_of_texts(CAPTION, ASK), _MAP),
        "engines_of": full_match("|[0-9a-f]{64}", "a SHA-256, or an empty text"),
    },
)  # fmt: skip
"""All fields of ``bundle.json`` except ``schema_version``."""


_OPTIMIZED_GRAPH = record(
    {
        "file": file_name,
        "passes": list_of(text),
        "one_by_one": flag,
        "layout": flag,
        "parity": list_of(PARITY),
        "cosine": nullable(finite_number()),
        "milliseconds": nullable(list_of(finite_number(0), 2, 2)),
    },
    {"timed_with": mapped(text, text)},
)
OPTIMIZED_FIELDS = record(
    {
        "backend": text,
        "bundle_sha256": sha256,
        "graphs": mapped(text, _OPTIMIZED_GRAPH),
        "left": mapped(text, text),
        "files": mapped(file_name, FILE_RECORD),
        "versions": mapped(text, text),
        "machine": text,
    }
)
"""The fields of ``optimized.json``, except ``schema_version``."""

_COUNTS = mapped(text, whole(0, MAX_LENGTH))
_ENGINE = record(
    {
        "sha256": sha256,
        "size": whole(0, MAX_BYTES),
        "precision": precision,
        "profiles": list_of(text),
        "seconds": finite_number(0),
        "warnings": list_of(text),
        "asked": _COUNTS,
        "landed": nullable(_COUNTS),
        **TENSORS,
    },
    {"cache": text},
)
_FINGERPRINT = record(
    {},
    {
        "target": text,
        "tensorrt": text,
        "gpus": list_of(full_match(r"sm\d{1,6}", "a compute capability, such as sm86")),
        "gpu": text,
        "multiprocessors": whole(0, MAX_LENGTH),
        "memory_gib": whole(0, MAX_LENGTH),
        "driver": text,
        "machine": text,
        "bundle_sha256": text,
        "version_compatible": flag,
        "hardware_compatible": flag,
    },
)
ENGINES_FIELDS = record(
    {
        "fingerprint": _FINGERPRINT,
        "rebuild": list_of(text),
        "capacity": whole(0, MAX_LENGTH),
        "engines": mapped(full_match(r"\w{1,100}", "the name of a graph"), _ENGINE),
    }
)
"""The fields of ``engine.json``, except ``schema_version``."""


def disagreements(
    graphs: Mapping[str, GraphSpec],
    cache: CacheSpec | None,
    vocab_size: int,
    prompt: PromptSpec | None,
    output_size: tuple[int, int] | None,
    elastic: ElasticSpec | None = None,
) -> Iterator[str]:
    """Compares the sizes in a manifest with the inputs and outputs of its graphs.

    Args:
        graphs: The graphs' inputs and outputs, by name.
        cache: The decoder's KV cache.
        vocab_size: Number of logits.
        prompt: How pictures and texts become the decoder's input.
        output_size: Height and width of a preprocessed picture; None if they vary.
        elastic: The numbers of queries of the bridge; None if it works with all queries only.

    Yields:
        A sentence for each value that does not fit.
    """
    if not graphs:
        yield "graphs: expected at least one graph, got none"
    for graph, spec in graphs.items():
        for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
            if len({tensor.name for tensor in tensors}) < len(tensors):
                yield f"graphs.{graph}: two {kind}s have one name"
    if DECODER in graphs:
        yield from _decoder(graphs[DECODER], cache, vocab_size)
    pixels = _tensor(graphs, VISION, "pixel_values", inputs=True)
    if VISION in graphs and (pixels is None or pixels.dtype not in FLOATS):
        yield f"graphs.{VISION}: expected an input pixel_values in floating point"
    sides = () if pixels is None else tuple(dim for dim in pixels.dims[-2:] if isinstance(dim, int))
    if output_size is not None and len(sides) == 2 and sides != output_size:
        yield f"preprocessing: pictures of {output_size} pixels do not fit pixel_values of {sides}"
    yield from _elastic(_tensor(graphs, BRIDGE, QUERY_IDS, inputs=True), elastic)
    tokens = _tensor(graphs, BRIDGE, "visual_tokens", inputs=False)
    takes_tokens = prompt is not None and (prompt.visual_tokens > 0 or prompt.kind != INTERLEAVED)
    if prompt is not None and takes_tokens and tokens is not None and len(tokens.dims) == 3:
        count = tokens.dims[1] if elastic is None else elastic.max_queries
        if isinstance(count, int) and prompt.visual_tokens != count * prompt.frames:
            yield (
                f"prompt.visual_tokens: expected {count * prompt.frames}, as the bridge has {count} for each of "
                f"{prompt.frames} pictures, got {prompt.visual_tokens}"
            )


def _elastic(query_ids: TensorSpec | None, elastic: ElasticSpec | None) -> Iterator[str]:
    """Yields a sentence if manifest and bridge graph differ in the least or the largest number of queries."""
    if query_ids is None and elastic is None:
        return
    axis = query_ids.dims[-1] if query_ids is not None and query_ids.dims else None
    wanted = (axis.min, axis.max) if isinstance(axis, Axis) else None
    given = None if elastic is None else (elastic.min_queries, elastic.max_queries)
    if wanted != given:
        yield f"elastic: expected the range of the bridge's input {QUERY_IDS}, {wanted}, got {given}"


def _tensor(graphs: Mapping[str, GraphSpec], graph: str, tensor: str, *, inputs: bool) -> TensorSpec | None:
    spec = graphs.get(graph)
    if spec is None:
        return None
    return next((each for each in (spec.inputs if inputs else spec.outputs) if each.name == tensor), None)


def _decoder(spec: GraphSpec, cache: CacheSpec | None, vocab_size: int) -> Iterator[str]:
    if cache is None:
        yield "cache: expected the sizes of the decoder's KV cache, got null"
        return
    logits = next((tensor for tensor in spec.outputs if tensor.name == "logits"), None)
    if logits is None or not logits.dims or logits.dims[-1] != vocab_size:
        yield f"vocab_size: expected the width of the decoder's output logits, got {vocab_size}"
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    if "inputs_embeds" not in inputs or inputs["inputs_embeds"].dtype not in FLOATS:
        yield f"graphs.{DECODER}: expected an input inputs_embeds in floating point"
    past = [name for name in inputs if name.startswith(PAST)]
    if len(past) != len(cache.past_names()):
        expected = len(cache.past_names())
        yield f"cache: expected {expected} inputs {PAST}* of the decoder for {cache.num_layers} layers, got {len(past)}"
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    for names, tensors in ((cache.past_names(), inputs), (cache.present_names(), outputs)):
        for each in names:
            dims = tensors[each].dims if each in tensors else ()
            if len(dims) != 4 or (dims[1], dims[3]) != (cache.num_heads, cache.head_dim):
                yield f"cache: expected {each} of {cache.num_heads} heads of width {cache.head_dim} in the decoder"
                return
