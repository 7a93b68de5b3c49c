"""A whole decoder in kernels, run on the CPU through the shim, against its portable graph: OPT and Llama."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="the portable graph runs in ONNX Runtime")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.safetensors_file import SafetensorsFile
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import TokenTable
from blip2edge.calibration.pipeline import calibrate
from blip2edge.errors import BackendError, BundleError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.graph_files import load_graph
from blip2edge.optimization.cuda_kernels.layout import layout_of_graph
from blip2edge.runtime.cuda.decoding import session as sessions
from blip2edge.runtime.cuda.decoding.choice import TokenChoice
from blip2edge.runtime.cuda.decoding.greedy import AHEAD, KernelDecoder, KernelState
from blip2edge.runtime.cuda.decoding.session import KernelBuffers, KernelSession
from blip2edge.runtime.cuda.device.driver import DriverDevice
from blip2edge.runtime.cuda.device.interface import KernelDevice
from blip2edge.runtime.cuda.kernel import Launch
from blip2edge.runtime.cuda.plan import RunSizes, needed_kernels, plan_run
from blip2edge.runtime.cuda.token_table import load_table, table_format
from blip2edge.runtime.cuda.weights import DecoderWeights, load_weights, planned_weights
from blip2edge.runtime.decoding.kv import in_place
from blip2edge.runtime.decoding.kv.growing import GrowingDecoder
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.sampling import StepScores, penalize_repetition
from blip2edge.runtime.decoding.state import GreedyState
from tests import drawing
from tests.families import drawing_llama
from tests.runtime.cuda.fake_driver import CUBIN, FakeDriver
from tests.runtime.cuda.portable import Portable
from tests.runtime.cuda.shim_device import ShimDevice
from tests.runtime.cuda.shimmed import FORWARD, RANDOM
from tests.runtime.decoding.generating import generate, rows_of

Array = np.ndarray[Any, Any]
Logits = Callable[[Any], Array]

TOLERANCE = 0.01
"""Largest difference of a logit, as a share of the largest: the graph rounds every value to fp16, the kernels fewer."""


def draw_opt(directory: Path) -> None:
    drawing.save(directory, seed=5)


def draw_llama(directory: Path) -> None:
    """Two query heads share a head of keys; heads are 16 wide, as rotary positions in ONNX Runtime need."""
    drawing_llama.draw_blip2(directory, 6, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


KINDS = {"opt": draw_opt, "llama": draw_llama}


@pytest.fixture(scope="module")
def bundle_of(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The bundle of a kind in a precision: fp16, fp32, or with weights in int8 or int4 on fp16."""
    root = tmp_path_factory.mktemp("decoders")

    def exported(kind: str, precision: str) -> Path:
        checkpoint, output = root / kind, root / f"{kind}-{precision}"
        if not checkpoint.exists():
            KINDS[kind](checkpoint)
        return output if output.exists() else export_checkpoint(checkpoint, output, precision=precision).bundle

    def made(kind: str, precision: str) -> Path:
        if (kind, precision) == ("opt", "fp32"):
            return tiny_bundle
        if not precision.startswith("int"):
            return exported(kind, precision)
        output, pictures = root / f"{kind}-{precision}", root / "pictures"
        if not pictures.exists():
            pictures.mkdir()
            for at, picture in enumerate(drawing.draw_pictures(4)):
                picture.save(pictures / f"{at}.png")
        if not output.exists():
            parent = exported(kind, "fp16")
            calibrate(parent, output, images=pictures, weights=precision, activations=(), threads=1)
        return output

    return made


class Pair:
    """The same decoder in kernels and as the portable graph."""

    def __init__(
        self, directory: Path, rows: Sequence[int], order: int = FORWARD, multiprocessors: int = 4, driver: bool = False
    ) -> None:
        bundle = Bundle.open(directory)
        manifest, spec, path = bundle.manifest, bundle.graph(DECODER).spec, bundle.file(f"{DECODER}.onnx")
        assert manifest.cache is not None
        self.layout = layout_of_graph(load_graph(path), manifest.cache, manifest.max_positions)
        table = bundle.file(EMBEDDINGS_FILE)
        kernels = needed_kernels(planned_weights(self.layout), rows)
        kernels += table_format(SafetensorsFile(table), EMBEDDINGS_TENSOR).kernels
        self.shim, self.driver = (
            ShimDevice(multiprocessors, order),
            FakeDriver(kernels, multiprocessors=multiprocessors),
        )
        self.device: KernelDevice = self.shim
        if driver:
            self.device = opened = DriverDevice(self.driver)
            opened.load(CUBIN)
        else:
            self.shim.compile(kernels)
        weights = load_weights(self.layout, directory, self.device)
        stored = load_table(table, EMBEDDINGS_TENSOR, self.device)
        dtype = next(tensor.dtype for tensor in spec.inputs if tensor.name == "inputs_embeds")
        self.table = TokenTable(bundle.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, dtype)
        self.session = session = KernelSession(weights, self.device)
        self.kernels = KernelDecoder(session, spec, manifest.cache, self.table, manifest.max_positions, stored)
        self.graph = GrowingDecoder(Portable(path), spec, manifest.cache, self.table)
        self.compared = 0

    def prompts(self, lengths: Sequence[int], seed: int = 0) -> list[Array]:
        random = np.random.default_rng(seed)
        return [self.table.rows(random.integers(4, 100, length)) for length in lengths]

    def same(self, found: Array, wanted: Array) -> Array:
        """Checks logits, and returns the likeliest tokens, which must be equal."""
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
        tokens: Array = wanted.argmax(axis=-1)
        assert np.array_equal(found.argmax(axis=-1), tokens)
        self.compared += tokens.size
        return tokens


@pytest.fixture
def pair_of(bundle_of: Callable[[str, str], Path]) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(kind: str, precision: str, rows: Sequence[int], **given: Any) -> Pair:
        made.append(Pair(bundle_of(kind, precision), rows, **given))
        return made[-1]

    yield make
    for pair in made:
        pair.session.close()
        assert not pair.driver.memory
        assert not pair.driver.live


SLOW = pytest.mark.slow
EVERY = [
    pytest.param("opt", "fp32"),  # its weights are rounded to fp16
    pytest.param("llama", "int4"),
    pytest.param("opt", "fp16", marks=SLOW),
    pytest.param("opt", "int8", marks=SLOW),
    pytest.param("opt", "int4", marks=SLOW),
    pytest.param("llama", "fp16", marks=SLOW),
    pytest.param("llama", "int8", marks=SLOW),
]


@pytest.mark.parametrize(("kind", "precision"), EVERY)
def test_ragged_batches_drafts_and_beams_give_the_graphs_ids(
    pair_of: Callable[..., Pair], kind: str, precision: str
) -> None:
    pair = pair_of(kind, precision, (1, 2, 3, 5))
    prompts = pair.prompts((6, 3))
    (found, ours), (wanted, theirs) = pair.kernels.prefill(prompts), pair.graph.prefill(prompts)
    for _ in range(4):  # greedy, rows of different lengths
        tokens = pair.same(found, wanted)
        found, wanted = ours.step(tokens), theirs.step(tokens)
    drafted = np.array([[7, 8, 9], [10, 11, 12]])  # three tokens are verified; one, and two, are kept
    pair.same(ours.extend(drafted), theirs.extend(drafted))
    kept = ours.lengths - np.array([2, 1])
    ours.truncate(kept)
    theirs.truncate(kept)
    assert np.array_equal(ours.lengths, theirs.lengths)
    for order in ([1, 0], [0, 0], [1, 0, 1]):  # beams: rows are exchanged, repeated, added
        rows = np.array(order)
        ours.select(rows)
        theirs.select(rows)
        tokens = np.arange(20, 20 + len(rows))
        pair.same(ours.step(tokens), theirs.step(tokens))
    more = np.array([[7, 8], [9, 10], [11, 12]])  # row by row, each with its part of the table of rows
    assert isinstance(ours, KernelState)
    assert ours._buffers.addresses(0).reordered
    pair.same(ours.extend(more), theirs.extend(more))
    ours.join(pair.kernels.prefill(pair.prompts((4,), 2))[1])
    theirs.join(pair.graph.prefill(pair.prompts((4,), 2))[1])
    assert not ours._buffers.addresses(0).reordered
    tokens = np.array([30, 31, 32, 33])
    pair.same(ours.step(tokens), theirs.step(tokens))
    assert pair.compared == 2 * 4 + 6 + 7 + 6 + 4


@pytest.mark.parametrize(("kind", "precision"), [EVERY[0], pytest.param("llama", "int4", marks=SLOW), *EVERY[2:]])
def test_greedy_tokens_are_chosen_on_the_device(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """With a penalty, an end token that is held, rows of different lengths, and a cache that grows on the way."""
    monkeypatch.setattr(in_place, "ROOM", 2)
    pair = pair_of(kind, precision, (1, 2, 3, 5))
    prompts = pair.prompts((12, 3))  # the cache has room for 16 slots at first
    (found, ours), (wanted, theirs) = pair.kernels.prefill(prompts), pair.graph.prefill(prompts)
    tokens = pair.same(found, wanted)
    held = np.array([int(theirs_next) for theirs_next in wanted.argsort(axis=-1)[1, -3:]])
    rules = [StepScores(np.array([7, 8]), 1.0), StepScores(np.arange(5, 40), 1.3, held, 2)]
    seen = [list(rule.seen) for rule in rules]
    assert isinstance(ours, GreedyState)
    assert ours.gives_logprobs
    greedy = ours.greedy(tokens, rules)
    for step in range(6):
        logits = theirs.step(tokens)
        scores = logits.copy()
        for row, rule in enumerate(rules):
            penalize_repetition(scores[row], np.unique(seen[row]), rule.penalty)
            if step < rule.held_steps:
                scores[row, rule.held] = -np.inf
        tokens = scores.argmax(axis=-1)
        chosen, logprobs = next(greedy)
        assert chosen.tolist() == tokens.tolist()
        exact = logits[[0, 1], tokens] - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
        assert np.abs(logprobs - exact).max() < 2 * TOLERANCE * np.abs(logits).max()
        for row, token in enumerate(tokens):
            seen[row].append(token)
    greedy.close()
    assert ours.lengths.tolist() == [18, 9]
    # In each of two caches one step ran as it is; the others are replays of one graph, a step ahead of the tokens.
    assert (pair.shim.captured, pair.shim.replayed) == (2, 6 - 2 + (AHEAD - 1))
    assert not pair.shim.fetched
    found, wanted = ours.step(tokens), theirs.step(tokens)  # the state holds all tokens but the last ones
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def copied_reorder(buffers: KernelBuffers, rows: Array, lengths: Array) -> None:
    """Copies the cache at each selection."""
    buffers._origins.select(rows, lengths)
    buffers.settle(lengths[rows])


@pytest.mark.parametrize(("kind", "precision"), [EVERY[0], pytest.param("llama", "int4", marks=SLOW), *EVERY[2:]])
def test_beam_search_reorders_a_table_and_gives_the_graphs_ids(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """The cache is copied once if prompts differ in length, else never; it also grows on the way."""
    monkeypatch.setattr(in_place, "ROOM", 2)
    pair = pair_of(kind, precision, (1, 2, 3, 5))
    for lengths, moves in (((6, 6), 0), ((3, 6), 1), ((5,), 0)):
        for options in BEAMS:
            (found, ours), (wanted, theirs) = (one.prefill(pair.prompts(lengths)) for one in (pair.kernels, pair.graph))
            ids = [[5]] * len(lengths)
            before = pair.session.moves
            texts = generate(found, ours, ids, options)
            assert pair.session.moves - before == moves
            found, copying = pair.kernels.prefill(pair.prompts(lengths))
            with monkeypatch.context() as copies:
                copies.setattr(KernelBuffers, "reorder", copied_reorder)
                assert generate(found, copying, ids, options) == texts  # log-probabilities as well, bit for bit
            assert pair.session.moves - before > moves
            oracle = generate(wanted, theirs, ids, options)
            assert [one.tokens for one in texts] == [one.tokens for one in oracle], options
            # The state goes on after the search: greedy steps need the rows in their own memory.
            tokens, steps = np.arange(30, 30 + ours.batch_size), []
            for state in (ours, copying):
                assert isinstance(state, KernelState)
                greedy = state.greedy(tokens, [StepScores(np.zeros(0, np.int64))] * len(tokens))
                steps.append([next(greedy)[0].tolist() for _ in range(2)])
                greedy.close()
            assert steps[0] == steps[1]


BEAMS = (
    GenerationOptions(max_new_tokens=7, num_beams=3),
    GenerationOptions(max_new_tokens=6, num_beams=2, length_penalty=0.5, repetition_penalty=1.2, eos_token_ids=(9, 31)),
)


DRAWN = (
    GenerationOptions(max_new_tokens=6, temperature=0.9, seed=4),
    GenerationOptions(max_new_tokens=6, top_k=8, top_p=0.9, repetition_penalty=1.3, seed=5),
    GenerationOptions(max_new_tokens=6, temperature=0.7, top_p=0.8, min_new_tokens=3, eos_token_ids=(9, 11), seed=6),
)


@pytest.mark.parametrize(("kind", "precision"), [EVERY[0], pytest.param("llama", "int4", marks=SLOW), *EVERY[2:]])
def test_drawn_tokens_are_those_of_the_portable_graph(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """For the same seed; the GPU draws with the host's random numbers, so that no logits are read after the prompt.

    The host draws the same texts from the kernels' logits. Those of the graph differ in rounding, so that a number at
    the border of two tokens may give the other one; the graph gets the kernels' tokens as earlier tokens.
    """
    pair = pair_of(kind, precision, (1, 2, 3, 5))
    reads: list[Any] = []
    equal = total = 0

    def read(*given: Any) -> Array:
        reads.append(given[1:])
        return ShimDevice.read(pair.shim, *given)

    for options in DRAWN:
        (found, ours), (wanted, theirs) = (one.prefill(pair.prompts((6, 3))) for one in (pair.kernels, pair.graph))
        with monkeypatch.context() as counted:
            counted.setattr(pair.shim, "read", read)
            texts = generate(found, ours, [[5], [7]], options)
        with monkeypatch.context() as host:
            host.setattr(KernelState, "draws", False)
            again = generate(*pair.kernels.prefill(pair.prompts((6, 3))), [[5], [7]], options)
        assert [one.tokens for one in texts] == [one.tokens for one in again], options
        rows = rows_of(wanted, [[5], [7]], options)
        for tokens in zip_longest(*(one.tokens for one in texts), fillvalue=0):
            chosen = [row.choose(logits) for row, logits in zip(rows, wanted, strict=True)]
            equal += int(np.sum(np.array(chosen) == tokens))
            total += len(tokens)
            for row, token in zip(rows, tokens, strict=True):
                row.accept(token)
            wanted = theirs.step(np.array(tokens))
    assert equal >= 0.9 * total, (equal, total)
    assert set(reads) == {((2, 2), np.int32)}  # tokens and log-probabilities
    assert not pair.shim.fetched


def test_a_token_that_is_left_to_the_host_is_drawn_there(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After slot 8 the GPU has no random numbers: the host goes on, and the cache has all tokens until then."""
    pair, options = pair_of("opt", "fp32", (1, 2, 3, 5)), DRAWN[1]
    begin = TokenChoice.begin

    def with_few_numbers(choice: TokenChoice, *given: Any) -> None:
        monkeypatch.setattr(choice, "_slots", 9)
        begin(choice, *given)

    monkeypatch.setattr(TokenChoice, "begin", with_few_numbers)
    (found, ours), (wanted, theirs) = (one.prefill(pair.prompts((6, 3))) for one in (pair.kernels, pair.graph))
    texts, oracle = (generate(*one, [[5], [7]], options) for one in ((found, ours), (wanted, theirs)))
    assert [one.tokens for one in texts] == [one.tokens for one in oracle]
    assert isinstance(ours, KernelState)
    assert ours.lengths.tolist() == [6 + 5, 3 + 5]
    assert not pair.shim.fetched


def test_the_first_error_of_a_step_is_reported(pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that were launched ahead fail as well; all of them are waited for."""
    pair = pair_of("opt", "fp32", (1, 2, 3, 5))
    found, ours = pair.kernels.prefill(pair.prompts((4,)))
    errors: list[str] = []

    def failing(*_: Any) -> Callable[[], Array]:
        def wait() -> Array:
            errors.append(f"error {len(errors) + 1}")
            raise BackendError(errors[-1])

        return wait

    monkeypatch.setattr(pair.shim, "fetch", failing)
    assert isinstance(ours, GreedyState)
    with pytest.raises(BackendError, match="error 1"):
        next(ours.greedy(found.argmax(axis=-1), [StepScores(np.zeros(0, np.int64))]))
    assert len(errors) == AHEAD


def test_the_driver_gives_the_graphs_ids_and_a_later_text_replays(pair_of: Callable[..., Pair]) -> None:
    """Two texts, one after the other: the second one runs in the memory of the first, so that nothing is captured."""
    pair = pair_of("opt", "fp32", (1, 2, 3, 5), driver=True)
    calls, plain = pair.driver.calls, [StepScores(np.zeros(0, np.int64), 1.0)]
    made: Counter[str] = Counter()
    for text in range(2):
        before = Counter(calls)
        (found, ours), (wanted, theirs) = (
            pair.kernels.prefill(pair.prompts((7,))),
            pair.graph.prefill(pair.prompts((7,))),
        )
        tokens = pair.same(found, wanted)
        assert isinstance(ours, GreedyState)
        greedy = ours.greedy(tokens, plain)
        for _ in range(5):
            tokens = theirs.step(tokens).argmax(axis=-1)
            assert next(greedy)[0].tolist() == tokens.tolist()
        greedy.close()
        pair.same(ours.step(tokens), theirs.step(tokens))
        del greedy, ours
        made = Counter(calls) - before
        # The prefill, and a step on the host, are captured when they are repeated; greedy steps in the first text.
        assert made["cuGraphInstantiate"] == (1, 2)[text]
        assert made["cuGraphLaunch"] == (4 + AHEAD - 1, 1 + 5 + AHEAD - 1 + 1)[text]
    assert made["cuMemAlloc"] == 0
    assert made["cuStreamSynchronize"] == 2  # the logits that the host reads


def test_a_run_is_planned_once_and_memory_is_freed(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[RunSizes] = []

    def planning(weights: DecoderWeights, sizes: RunSizes, *given: Any) -> list[Launch]:
        planned.append(sizes)
        return plan_run(weights, sizes, *given)

    monkeypatch.setattr(sessions, "plan_run", planning)
    monkeypatch.setattr(sessions, "KEPT_SIZES", 2)
    pair = pair_of("opt", "fp32", (1, 2, 3, 5))
    lives = []
    for length in (3, 5, 7, 3):
        _, state = pair.kernels.prefill(pair.prompts((length,)))
        for token in (9, 10, 11):
            state.step(np.array([token]))
        del state
        lives.append(set(pair.shim.memory))
    assert [sizes.steps for sizes in planned] == [3, 1, 5, 7, 3]  # of two sizes, the older one was given up
    assert lives[1] == lives[2]  # prompts of 5 and 7 tokens share buffers
    kept = len(pair.shim.memory)
    for _ in range(3):
        pair.kernels.prefill(pair.prompts((3,)))
    assert len(pair.shim.memory) == kept
    short = iter([True, False])

    def allocate(size: int) -> int:
        if next(short, False):
            raise BackendError("cuMemAlloc failed: out of memory", "lower the batch size")
        return ShimDevice.allocate(pair.shim, size)

    monkeypatch.setattr(pair.shim, "allocate", allocate)
    assert pair.session.take((2, 2, 8, 16)).address in pair.shim.memory  # the free caches made room
    assert len(pair.shim.memory) <= kept
    pair.session.close()
    assert not pair.shim.memory
    with pytest.raises(BackendError, match="this graph is closed"):
        pair.kernels.prefill(pair.prompts((3,)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("opt", "int4"), ("llama", "fp16")])
def test_rows_join_and_the_order_of_threads_changes_nothing(
    pair_of: Callable[..., Pair], kind: str, precision: str
) -> None:
    """Also with as many blocks as a large GPU gets: K and the cache are cut, and the last block adds up."""
    found = []
    for order, multiprocessors in ((FORWARD, 4), (RANDOM, 4), (RANDOM, 200)):
        pair = pair_of(kind, precision, (1, 2, 3, 5), order=order, multiprocessors=multiprocessors)
        ours, theirs = pair.kernels, pair.graph
        (_, first), (_, oracle) = ours.prefill(pair.prompts((20,))), theirs.prefill(pair.prompts((20,)))
        (_, second), (_, other) = ours.prefill(pair.prompts((2, 5), 1)), theirs.prefill(pair.prompts((2, 5), 1))
        first.join(second)
        oracle.join(other)
        tokens, logits = np.array([30, 40, 50]), []
        for _ in range(3):
            logits.append(first.step(tokens))
            tokens = pair.same(logits[-1], oracle.step(tokens))
        found.append(np.array(logits))
    assert np.array_equal(found[0], found[1])  # bit for bit
    assert np.abs(found[0] - found[2]).max() < TOLERANCE * np.abs(found[0]).max()


CHANGES: tuple[tuple[str, str, str], ...] = (
    ("Relu", "Gelu", "the activation of layer 1 is neither ReLU nor SwiGLU"),
    ("LayerNormalization", "Identity", "the final norm is neither a LayerNorm nor an RMSNorm"),
    ("GatherElements", "Identity", "the choice of the positions with logits has another form"),
    ("Softmax", "LogSoftmax", "its attention is not causal self-attention"),
    ("Gather", "GatherND", "its first layer begins with more than embeddings and learned positions"),
)


@pytest.mark.parametrize(("operator", "other", "message"), CHANGES, ids=[change[0] for change in CHANGES])
def test_other_decoders_are_refused_by_name(tiny_bundle: Path, operator: str, other: str, message: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    model = load_graph(bundle.file(f"{DECODER}.onnx"))
    for node in model.graph:
        if node.op_type == operator:
            node.op_type = other
    assert bundle.manifest.cache is not None
    with pytest.raises(BundleError, match=message):
        layout_of_graph(model, bundle.manifest.cache, bundle.manifest.max_positions)


def test_blocks_along_another_axis_are_refused(bundle_of: Callable[[str, str], Path]) -> None:
    bundle = Bundle.open(bundle_of("llama", "int4"))
    model = load_graph(bundle.file(f"{DECODER}.onnx"))
    next(one for one in model.graph if one.op_type == "DequantizeLinear").attributes.pop("axis")  # 1 by default
    assert bundle.manifest.cache is not None
    with pytest.raises(BundleError, match="lie along axis 1, not along the input"):
        layout_of_graph(model, bundle.manifest.cache, bundle.manifest.max_positions)
