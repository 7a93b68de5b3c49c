"""Logits processors compared with transformers': their scores, and the ids that `generate` gives with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge import Captioner
from blip2edge.errors import UsageError
from blip2edge.runtime.decoding.logits_processors import PROCESSORS, LogitsProcessors
from blip2edge.runtime.decoding.options import PROCESSED, SAMPLING, GenerationOptions, merged
from blip2edge.runtime.decoding.sampling import (
    FILTERS,
    StepScores,
    filter_scores,
    log_softmax,
    penalize_repetition,
    sampling_filters,
)
from blip2edge.runtime.decoding.state import ChosenStep
from tests.runtime.conftest import generation_arguments
from tests.runtime.decoding.generating import generate

pytest.importorskip("torch", reason="the oracle runs in torch")
pytest.importorskip("transformers", reason="the oracle is transformers")
import torch
from transformers import GenerationConfig

VOCABULARY, ENDS = 40, (5, 17)

VALUES: dict[str, Sequence[Any]] = {
    "sequence_bias": ({(3,): 2.5, (4, 9): -3.0}, [[[1, 2, 3], 4.0], [[2, 3], -float("inf")], [[3], 0.5], [[3], 1]]),
    "encoder_repetition_penalty": (1.7, 0.6),
    "repetition_penalty": (1.4, 0.8),
    "no_repeat_ngram_size": (1, 2, 3),
    "encoder_no_repeat_ngram_size": (1, 2),
    "bad_words_ids": ([[7], [1, 2], [5]], [[2], [2, 3, 1], [30, 2]]),
    "min_length": (3, 9),
    "min_new_tokens": (2, 6),
    "forced_bos_token_id": (8,),
    "forced_eos_token_id": (5, [17, 5]),
    "remove_invalid_values": (True,),
    "exponential_decay_length_penalty": ((1, 1.4), [0, 0.7]),
    "suppress_tokens": ([0, 11, 17], [39, 99]),
    "begin_suppress_tokens": ([1, 2, 33],),
    "renormalize_logits": (True,),
    "temperature": (0.6, 3.0),
    "top_k": (4, 25),
    "top_p": (0.5, 0.95),
    "min_p": (0.0, 0.02, 0.5, 1.0),
    "typical_p": (0.2, 0.9, 1.0),
    "epsilon_cutoff": (0.0, 0.003, 0.3),
    "eta_cutoff": (0.003, 0.3),
}
"""Values of each option, in the forms that transformers and JSON files have."""


def test_every_option_has_values() -> None:
    assert {*PROCESSORS, *SAMPLING} == VALUES.keys()
    assert {*PROCESSORS} == {*PROCESSED}
    assert set(SAMPLING) >= FILTERS.keys()


def their_scores(
    model: Any, options: GenerationOptions, prompt: Sequence[int], generated: Sequence[int], scores: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The scores after the processors that transformers makes for these options."""
    values = generation_arguments(options) | {"max_length": len(prompt) + options.max_new_tokens}
    values |= {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    if options.min_new_tokens:  # as in `_prepare_generated_length`
        values["min_length"] = len(prompt) + options.min_new_tokens
    config = GenerationConfig(**values | {"do_sample": options.sampling})
    config._eos_token_tensor = torch.tensor(options.eos_token_ids)
    processors = model._get_logits_processor(config, len(prompt), torch.tensor([prompt]), device="cpu")
    found = processors(torch.tensor([[*prompt, *generated]]), torch.from_numpy(scores.copy())[None])
    return np.asarray(found[0].numpy(), np.float32)


def our_scores(
    options: GenerationOptions, prompt: Sequence[int], generated: Sequence[int], scores: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The same by the runtime."""
    processors, ours = LogitsProcessors(prompt, options, VOCABULARY), scores.copy()
    if processors.act(len(generated)):
        processors(ours, np.array(generated, np.int64))
    if not options.sampling or not np.isfinite(ours.max()):
        return ours
    filters = sampling_filters(options)
    kept, values = filter_scores(ours, options.temperature, options.top_k, options.top_p, filters)
    filtered = np.full(VOCABULARY, -np.inf, np.float32)
    filtered[slice(None) if kept is None else kept] = values
    return filtered


def assert_same_scores(model: Any, options: GenerationOptions, rng: np.random.Generator) -> bool:
    """Compares a random step; returns whether the scores changed."""
    prompt = rng.integers(0, 5, rng.choice([1, 1, 4, 7])).tolist()
    count = int(rng.choice([0, 1, 2, 5, options.max_new_tokens - 1]))
    generated = rng.integers(0, 5, count).tolist()  # few different ones, so that n-grams repeat
    scores = (rng.standard_normal(VOCABULARY) * rng.choice([0.3, 3.0])).astype(np.float32)
    theirs = their_scores(model, options, prompt, generated, scores)
    ours = our_scores(options, prompt, generated, scores)
    if not np.isfinite(theirs.max()):
        assert not np.isfinite(ours.max())  # nothing is left, or a score is infinite
        return True
    if options.renormalize_logits:
        theirs, ours = log_softmax(theirs), log_softmax(ours)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(ours, theirs)
    return not np.array_equal(ours, scores)


@pytest.mark.parametrize("name", VALUES)
def test_scores_equal_transformers(opt_oracle: Any, name: str) -> None:
    """One option at a time, after a prompt of one id and of several."""
    rng, model = np.random.default_rng(len(name)), opt_oracle(0).model
    for value in VALUES[name]:
        base: dict[str, Any] = {"max_new_tokens": 8, "eos_token_ids": ENDS, name: value}
        if name in FILTERS:
            base["temperature"] = 1.5
        changed = [assert_same_scores(model, GenerationOptions(**base), rng) for _ in range(40)]
        neutral = value is True and name == "remove_invalid_values"
        assert any(changed) != neutral


@pytest.mark.parametrize("samples", [False, True])
def test_scores_of_several_options_equal_transformers(opt_oracle: Any, samples: bool) -> None:
    """The processors act in transformers' order."""
    rng, model = np.random.default_rng(int(samples)), opt_oracle(0).model
    for _ in range(300):
        names = [name for name in VALUES if (samples or name not in SAMPLING) and rng.random() < 0.35]
        chosen: dict[str, Any] = {name: VALUES[name][int(rng.integers(len(VALUES[name])))] for name in names}
        if samples:
            chosen.setdefault("temperature", 1.2)
            chosen.pop("forced_eos_token_id", None)  # two equal scores: top-p keeps the other one
        assert_same_scores(model, GenerationOptions(max_new_tokens=8, eos_token_ids=ENDS, **chosen), rng)


def test_invalid_values_are_removed(opt_oracle: Any) -> None:
    scores = np.arange(VOCABULARY, dtype=np.float32)
    scores[[3, 6, 8]] = np.nan, np.inf, -np.inf
    options = GenerationOptions(remove_invalid_values=True, suppress_tokens=(9,), eos_token_ids=ENDS)
    ours = our_scores(options, [1], [], scores)
    np.testing.assert_array_equal(ours, their_scores(opt_oracle(0).model, options, [1], [], scores))
    assert np.flatnonzero(~np.isfinite(ours)).tolist() == [9]


def cases(tokens: Sequence[int], prompt: int) -> list[dict[str, Any]]:
    """Options that change a text of these tokens.

    Args:
        tokens: The text that is generated without them.
        prompt: Number of ids before it.
    """
    first, second, third, end = (int(token) for token in tokens[:4])
    return [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.9, "suppress_tokens": [first]},
        {"bad_words_ids": [[first, second], [third]]},
        {"bad_words_ids": [[first], [end]], "eos_token_ids": (end,)},
        {"sequence_bias": {(first,): -4.0, (second, third): -float("inf")}},
        {"sequence_bias": [[[first, second], -6.5], [[end], 1.5]], "renormalize_logits": True},
        {"suppress_tokens": [first, third], "remove_invalid_values": True},
        {"begin_suppress_tokens": [first]},
        {"forced_eos_token_id": end, "eos_token_ids": (end,), "bad_words_ids": [[end]], "min_new_tokens": 7},
        {"forced_eos_token_id": [third]},
        {"exponential_decay_length_penalty": (2, 1.6), "eos_token_ids": (end, 11)},
        {"min_length": prompt + 6, "eos_token_ids": (first, end)},
        {"min_length": prompt + 6, "min_new_tokens": 2, "eos_token_ids": (first, end)},
    ]


BEAMS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 0.5},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
)


@pytest.mark.parametrize("search", BEAMS)
def test_ids_equal_generate(opt_oracle: Any, search: dict[str, Any]) -> None:
    for seed in (0, 1):
        oracle = opt_oracle(seed, (4,))
        free = GenerationOptions(max_new_tokens=10)
        plain = oracle.run(free)
        for case in cases(plain[0].tokens, 8):
            options = replace(free, **search, **case)
            found = oracle.run(options)
            assert [row.tokens for row in found] == [tokens for tokens, _ in oracle.reference(options)], case
            assert found != plain


@pytest.mark.parametrize("search", BEAMS[:2])
def test_ids_of_an_encoder_decoder_equal_generate(t5_oracle: Any, search: dict[str, Any]) -> None:
    oracle = t5_oracle(1)
    free = GenerationOptions(max_new_tokens=7)
    tokens = oracle.run(free)[0].tokens[1:]
    forced: dict[str, Any] = {
        "forced_bos_token_id": 33,
        "begin_suppress_tokens": [tokens[0], tokens[1]],
        "min_length": 5,
    }
    for case in (*cases(tokens, 1)[1::2], forced, {"forced_bos_token_id": 12, "no_repeat_ngram_size": 2}):
        options = replace(free, **search, **case)
        assert [row.tokens for row in oracle.run(options)] == [ids for ids, _ in oracle.reference(options)], case
    assert all(row.tokens[1] == 33 for row in oracle.run(replace(free, **search, **forced)))


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_never_stops_later(penalty: float, opt_oracle: Any) -> None:
    """`early_stopping="never"` goes on where a longer text may still be better."""
    different = 0
    for seed in range(5):
        oracle = opt_oracle(seed, (4,))
        end = oracle.run(GenerationOptions(max_new_tokens=4))[0].tokens[3]
        search = GenerationOptions(max_new_tokens=14, num_beams=3, length_penalty=penalty, eos_token_ids=(end,))
        never = replace(search, early_stopping="never")
        assert [row.tokens for row in oracle.run(never)] == [ids for ids, _ in oracle.reference(never)]
        different += oracle.run(never) != oracle.run(search)
    assert different


class DeviceState:
    """A state that can choose the likeliest token itself; counts who chose."""

    batch_size = 1

    gives_logprobs, draws = True, False

    def __init__(self) -> None:
        self.on_host = self.on_device = 0

    @staticmethod
    def logits(token: int) -> NDArray[np.float32]:
        return np.random.default_rng(token).standard_normal((1, VOCABULARY)).astype(np.float32)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.on_host += 1
        return self.logits(int(token_ids[0]))

    def choose(self, token_ids: NDArray[np.int64], rules: Sequence[StepScores]) -> Generator[ChosenStep, None, None]:
        (rule,) = rules
        seen, steps = set(rule.seen.tolist()), rule.held_steps
        while True:
            scores = self.logits(int(token_ids[0]))[0]
            penalize_repetition(scores, np.array(sorted(seen), np.int64), rule.penalty)
            if steps > 0:
                scores[rule.held] = -np.inf
            token_ids, steps = scores.argmax(keepdims=True), steps - 1
            seen |= {int(token_ids[0])} if rule.penalty != 1 else set()
            self.on_device += 1
            yield token_ids, np.full(1, -0.5, np.float32)

    def select(self, rows: NDArray[np.int64]) -> None:
        raise AssertionError("one row")

    def join(self, other: Any) -> None:
        raise AssertionError("one row")


class HostState:
    """The same logits from a state that leaves the choice to the host."""

    batch_size = 1

    def __init__(self) -> None:
        self._state = DeviceState()
        self.logits, self.step = self._state.logits, self._state.step
        self.select, self.join = self._state.select, self._state.join


@pytest.mark.parametrize(
    ("options", "on_host"),
    [
        ({}, 0),
        ({"suppress_tokens": [1]}, 9),
        ({"no_repeat_ngram_size": 3}, 9),
        ({"begin_suppress_tokens": [1]}, 0),
        ({"forced_eos_token_id": 5}, 1),
        ({"exponential_decay_length_penalty": (4, 1.1), "eos_token_ids": ENDS}, 5),
        ({"min_new_tokens": 4, "eos_token_ids": ENDS}, 0),
        ({"min_length": 5, "eos_token_ids": ENDS}, 0),
        ({"repetition_penalty": 1.7}, 0),
        ({"repetition_penalty": 1.7, "begin_suppress_tokens": [1], "min_new_tokens": 7, "eos_token_ids": ENDS}, 0),
    ],
)
def test_the_device_chooses_unless_an_unknown_processor_acts(options: dict[str, Any], on_host: int) -> None:
    state, wanted = DeviceState(), GenerationOptions(max_new_tokens=10, **options)
    row = generate(state.logits(0), state, [[3, 4]], wanted)[0]
    assert len(row.tokens) == 10
    on_cpu = HostState()
    assert generate(on_cpu.logits(0), on_cpu, [[3, 4]], wanted)[0].tokens == row.tokens
    assert (state.on_host, state.on_device) == (on_host, 9 - on_host)
    if "forced_eos_token_id" in options:
        assert row.tokens[-1] == 5


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 1}])
def test_where_all_tokens_are_excluded_the_lowest_id_is_taken(opt_oracle: Any, options: dict[str, Any]) -> None:
    excluded = GenerationOptions(max_new_tokens=3, suppress_tokens=range(200), **options)  # type: ignore[arg-type]
    assert opt_oracle(0).run(excluded)[0].tokens == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("no_repeat_ngram_size", -1, "whole number of at least 0, got -1"),
        ("encoder_no_repeat_ngram_size", 1.5, "whole number"),
        ("encoder_repetition_penalty", 0.0, "a number from 0.001 to 1000"),
        ("suppress_tokens", 3, "a list of ids, got 3"),
        ("begin_suppress_tokens", [1, "a"], "whole number of at least 0, got 'a'"),
        ("bad_words_ids", [3], "a list of ids, got 3"),
        ("bad_words_ids", "ab", "a list of lists of ids"),
        ("bad_words_ids", [[3], []], "got an empty one"),
        ("forced_bos_token_id", [3], "whole number"),
        ("forced_eos_token_id", "3", "a list of ids"),
        ("sequence_bias", {(1, 2): float("nan")}, "a number from -inf to 1e[+]06, got nan"),
        ("sequence_bias", [[[1], float("inf")]], "a number from -inf"),
        ("sequence_bias", [[1, 2, 3]], "a list of pairs"),
        ("sequence_bias", {(): 1.0}, "got an empty one"),
        ("min_length", True, "whole number"),
        ("exponential_decay_length_penalty", 1.2, "a start and a factor"),
        ("exponential_decay_length_penalty", (1, 0.0), "a number above 0"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("typical_p", 0.0, "a number above 0 to 1"),
        ("epsilon_cutoff", 1.0, "a number from 0"),
        ("eta_cutoff", -0.1, "a number from 0"),
        ("renormalize_logits", 1, "true or false, got 1"),
        ("remove_invalid_values", "yes", "true or false"),
        ("early_stopping", "always", "true, false or \"never\", got 'always'"),
    ],
)
def test_wrong_values(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"expected .?{name}.? .*{message}"):
        GenerationOptions(**{name: value})


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name not in ("repetition_penalty", "min_new_tokens")])
def test_none_is_off_and_options_can_be_compared(name: str) -> None:
    assert GenerationOptions(**{name: None}) == GenerationOptions()  # type: ignore[arg-type]
    one, same = (GenerationOptions(**{name: VALUES[name][0]}, eos_token_ids=ENDS) for _ in range(2))
    assert len({one, same, replace(one, max_new_tokens=7)}) == 2


DEFAULTS = {"eos_token_ids": [2], "pad_token_id": 3, "max_new_tokens": 30, "min_length": None}


@pytest.mark.parametrize(
    ("generation", "given", "expected"),
    [
        ({}, {}, {}),
        ({"num_beams": 3, "no_repeat_ngram_size": 2}, {}, {"num_beams": 3, "no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 0}, {}),
        ({"bad_words_ids": [[4]]}, {"bad_words_ids": None}, {}),
        ({"num_beams": 3}, {"top_p": 0.5}, {"top_p": 0.5}),
        ({"num_beams": 3}, {"temperature": 0.0}, {"num_beams": 3, "temperature": 0.0}),
        ({"temperature": 0.7, "top_k": 50}, {"num_beams": 2}, {"num_beams": 2}),
        ({"temperature": 0.7, "top_k": 50}, {"temperature": 0.2}, {"temperature": 0.2, "top_k": 50}),
        ({"temperature": 0.7, "min_p": 0.1}, {"num_beams": 1}, {"temperature": 0.7, "min_p": 0.1}),
        ({"min_new_tokens": 9}, {"max_new_tokens": 5}, {"min_new_tokens": 5, "max_new_tokens": 5}),
        ({"min_length": 9}, {"min_new_tokens": 40}, {"min_new_tokens": 40, "max_new_tokens": 40}),
    ],
)
def test_a_callers_options_replace_the_bundles(
    generation: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = GenerationOptions(**merged(DEFAULTS | generation, given))
    assert found == GenerationOptions(**{"max_new_tokens": 30, "eos_token_ids": (2,), **expected})


PROMPT = "what is it ?"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny LLaVA: the bundle, pictures, and transformers' ids for a picture and options."""
    from blip2edge.export.pipeline import export_checkpoint
    from tests.families import drawing_llama as drawing

    directory = tmp_path_factory.mktemp("llava")
    model, processor = drawing.draw_llava(directory / "checkpoint", 0)
    export_checkpoint(directory / "checkpoint", directory / "bundle")

    def reference(image: Any, **options: Any) -> list[int]:
        text = f"USER: <image>\n{PROMPT} ASSISTANT:"
        inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=10, **options)[0]
        return [int(token) for token in ids[inputs["input_ids"].shape[1] :]]

    return directory / "bundle", drawing.pictures(0), reference


def of_generation_config(tokens: Sequence[int], length: int) -> list[dict[str, Any]]:
    """Values of `generation_config.json` that change the caption; the prompt has that many ids."""
    prompted: list[dict[str, Any]] = [
        {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 0.5},
        {"encoder_repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "num_beams": 3},
        {"repetition_penalty": 1.9, "suppress_tokens": [tokens[0]], "num_beams": 3, "no_repeat_ngram_size": 2},
    ]
    renamed: list[dict[str, Any]] = [
        {"eos_token_id" if name == "eos_token_ids" else name: value for name, value in case.items()}
        for case in cases(tokens, length)
    ]
    return [*prompted, *({**case, "num_beams": 1 + 2 * (at % 2)} for at, case in enumerate(renamed))]


def test_captions_follow_the_manifest(llava: Any, tmp_path: Path) -> None:
    """The values as the manifest's defaults: captions, batches, streams and the scheduler equal `generate`."""
    bundle, pictures, reference = llava
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "bundle.json"
    manifest = json.loads(path.read_text())
    values: dict[str, Any] = {"no_repeat_ngram_size": 1, "suppress_tokens": [7, 8, 50], "repetition_penalty": 1.3}
    values["sequence_bias"] = [[[9], 1.5], [[60, 61], -2.0]]
    manifest["generation"] |= {**values, "max_new_tokens": 10}
    path.write_text(json.dumps(manifest))
    expected = [reference(picture, **values) for picture in pictures]
    with Captioner.load(tmp_path / "bundle", threads=1) as captioner:
        prompts = [PROMPT] * 3
        assert [list(captioner.caption(picture, prompt=PROMPT).tokens) for picture in pictures] == expected
        assert [list(result.tokens) for result in captioner.caption_many(pictures, prompts=prompts)] == expected
        together = captioner.caption_many(pictures, prompts=prompts, batch_size=3)
        assert [list(result.tokens) for result in together] == expected
        drafted = captioner.caption(pictures[0], prompt=PROMPT, draft="lookup")
        assert list(drafted.tokens) == expected[0]
        streamed = "".join(captioner.stream(pictures[0], prompt=PROMPT))
        assert streamed.strip() == captioner.caption(pictures[0], prompt=PROMPT).text
        searched = captioner.caption(pictures[0], prompt=PROMPT, num_beams=3)
        assert list(searched.tokens) == reference(pictures[0], num_beams=3, **values)
        off: dict[str, Any] = {**dict.fromkeys(("sequence_bias", "suppress_tokens"))}
        off |= {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
        plain = captioner.caption(pictures[0], prompt=PROMPT, **off)
        assert list(plain.tokens) == reference(pictures[0])
        assert list(plain.tokens) != expected[0]


def test_rows_of_the_scheduler_have_options_of_their_own(llava: Any) -> None:
    bundle, pictures, reference = llava
    with Captioner.load(bundle, threads=1) as captioner:
        free = captioner.caption(pictures[0], prompt=PROMPT, max_new_tokens=10).tokens
        length = captioner.prompts(PROMPT).length
        chosen = of_generation_config(free, length)
        expected = [reference(pictures[0], **case) for case in chosen]
        assert all(tuple(ids[: len(free)]) != free for ids in expected)
        with captioner.scheduler(max_batch=len(chosen)) as scheduler:
            requests = []
            for case in chosen:
                ours = {"eos_token_ids" if name == "eos_token_id" else name: value for name, value in case.items()}
                options = captioner.options(max_new_tokens=10, **ours)
                requests.append(scheduler.submit(pictures[0], options, prompt=PROMPT))
            found = [list(request.result().tokens) for request in requests]
    assert found == [ids[: len(row)] for ids, row in zip(expected, found, strict=True)]
    assert all(set(ids[len(row) :]) <= {3} for ids, row in zip(expected, found, strict=True))  # padding


def test_ids_outside_the_vocabulary(llava: Any) -> None:
    with Captioner.load(llava[0], threads=1) as captioner:
        for options in (
            {"bad_words_ids": [[3], [4, 120]]},
            {"sequence_bias": {(120,): 1.0}},
            {"forced_bos_token_id": 120},
            {"forced_eos_token_id": [1, 120]},
        ):
            with pytest.raises(UsageError, match="ids below 120, got 120"):
                captioner.options(**options)
        assert captioner.options(suppress_tokens=[1, 120]).suppress_tokens == (1, 120)  # as transformers
