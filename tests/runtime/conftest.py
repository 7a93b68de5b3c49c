"""Reference results for the generation tests: random tiny language models run by transformers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.options import GenerationOptions
from tests.runtime.decoding.generating import generate

if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
    import torch
    from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration


def _no_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch's no_grad, asked for when the function runs: without torch no oracle runs at all."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


SAME_FORM = (
    *("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"),
    *("forced_bos_token_id", "exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits"),
    *("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
)
"""Options that have transformers' form; the others are tuples where transformers has lists."""

VOCABULARY, WIDTH, SLOTS, IMAGE, PAD = 97, 32, 4, 96, 1


def _randomise(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            embedding = "embed" in name or "shared" in name
            torch.nn.init.normal_(weight, 0.0, 0.7 if embedding else 2.2 / weight.shape[1] ** 0.5)


def generation_arguments(options: GenerationOptions) -> dict[str, Any]:
    """The keywords of transformers' `generate`."""
    lists = {
        "bad_words_ids": [list(ids) for ids in options.bad_words_ids],
        "sequence_bias": [[list(ids), bias] for ids, bias in options.sequence_bias],
        "suppress_tokens": list(options.suppress_tokens),
        "begin_suppress_tokens": list(options.begin_suppress_tokens),
        "forced_eos_token_id": list(options.forced_eos_token_id),
    }
    return {
        **{name: getattr(options, name) for name in SAME_FORM},
        **{name: ids or None for name, ids in lists.items()},
        "max_new_tokens": options.max_new_tokens,
        "min_new_tokens": options.min_new_tokens or None,
        "num_beams": options.num_beams,
        "length_penalty": options.length_penalty,
        "repetition_penalty": options.repetition_penalty,
        "early_stopping": options.early_stopping,
        "eos_token_id": list(options.eos_token_ids) or None,
        "pad_token_id": PAD,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }


class OptOracle:
    """A tiny OPT whose prompts are four visual tokens and a ragged text, left-padded for transformers."""

    def __init__(self, seed: int, lengths: Sequence[int] = (3,)) -> None:
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=96,
            pad_token_id=PAD,
            bos_token_id=2,
            eos_token_id=2,
        )
        self.model = OPTForCausalLM(config).eval()
        _randomise(self.model, seed)
        self.model.generation_config.eos_token_id = None
        rng = np.random.default_rng(seed)
        self.prompts = [[IMAGE] * SLOTS + rng.integers(3, IMAGE, size).tolist() for size in lengths]
        self.visual = torch.randn(len(lengths), SLOTS, WIDTH)

    def inputs(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, mask and embeddings of some rows, as Blip2ForConditionalGeneration makes them."""
        longest = max(len(self.prompts[row]) for row in rows)
        ids = torch.tensor([[PAD] * (longest - len(self.prompts[row])) + self.prompts[row] for row in rows])
        mask = torch.tensor([[int(at >= longest - len(self.prompts[row])) for at in range(longest)] for row in rows])
        embeds = self.model.get_input_embeddings()(ids)
        slots = (ids == IMAGE).unsqueeze(-1).expand_as(embeds)
        return ids, mask, embeds.masked_scatter(slots, self.visual[list(rows)])

    @_no_grad
    def reference(self, options: GenerationOptions, criteria: Any = None) -> list[tuple[tuple[int, ...], float | None]]:
        """Generated ids and beam score of every row, by transformers."""
        ids, mask, embeds = self.inputs(range(len(self.prompts)))
        out = self.model.generate(
            inputs_embeds=embeds,
            input_ids=ids,
            attention_mask=mask,
            stopping_criteria=criteria,
            **generation_arguments(options),
        )
        scores = out.sequences_scores.tolist() if options.num_beams > 1 else [None] * len(ids)
        rows = [row[ids.shape[1] :].tolist() for row in out.sequences]
        return [(until_end(row, options), score) for row, score in zip(rows, scores, strict=True)]

    def start(self, rows: Sequence[int] | None = None) -> tuple[NDArray[np.float32], OptState, list[list[int]]]:
        """First logits, state and prompts, as the runtime's decoder gives them."""
        rows = range(len(self.prompts)) if rows is None else rows
        state = OptState(self, rows)
        return state.first_logits, state, [self.prompts[row] for row in rows]

    def run(self, options: GenerationOptions, rows: Sequence[int] | None = None, **more: Any) -> list[Generated]:
        """What the code under test generates."""
        return generate(*self.start(rows), options, **more)


def until_end(row: Sequence[int], options: GenerationOptions) -> tuple[int, ...]:
    """A row without the padding behind its end token."""
    for at, token in enumerate(row):
        if token in options.eos_token_ids:
            return tuple(row[: at + 1])
    return tuple(row)


class OptState:
    """The DecodeState protocol over transformers' OPT and its cache; notes what is asked of it."""

    @_no_grad
    def __init__(self, oracle: OptOracle, rows: Sequence[int]) -> None:
        self.model = oracle.model
        _, self.mask, embeds = oracle.inputs(rows)
        out = self.model(inputs_embeds=embeds, attention_mask=self.mask, position_ids=self._positions())
        self.cache = out.past_key_values
        self.first_logits: NDArray[np.float32] = out.logits[:, -1].numpy()
        self.steps: list[int] = []
        self.selects: list[list[int]] = []

    def _positions(self) -> torch.Tensor:
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def batch_size(self) -> int:
        return len(self.mask)

    @_no_grad
    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        assert token_ids.shape == (self.batch_size,)
        assert token_ids.dtype == np.int64
        self.steps.append(len(token_ids))
        self.mask = torch.cat([self.mask, torch.ones(len(token_ids), 1, dtype=torch.long)], dim=1)
        out = self.model(
            input_ids=torch.from_numpy(np.array(token_ids))[:, None],
            attention_mask=self.mask,
            position_ids=self._positions()[:, -1:],
            past_key_values=self.cache,
        )
        logits: NDArray[np.float32] = out.logits[:, -1].numpy()
        logits.flags.writeable = False  # whoever changes the decoder's output is told at once
        return logits

    def select(self, rows: NDArray[np.int64]) -> None:
        assert rows.dtype == np.int64
        self.selects.append(rows.tolist())
        index = torch.from_numpy(np.array(rows))
        self.mask = self.mask[index]
        self.cache.reorder_cache(index)

    def join(self, other: Any) -> None:
        raise AssertionError("nothing joins here")


class T5Oracle:
    """A tiny T5 with embeddings as the encoder's input; its state runs the decoder without a cache."""

    def __init__(self, seed: int, batch: int = 2) -> None:
        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
        )
        self.model = T5ForConditionalGeneration(config).eval()
        _randomise(self.model, seed)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.decoder_start_token_id = 0
        self.embeds = torch.randn(batch, 6, WIDTH)

    @_no_grad
    def reference(self, options: GenerationOptions) -> list[tuple[tuple[int, ...], float | None]]:
        mask = torch.ones(self.embeds.shape[:2], dtype=torch.long)
        arguments = generation_arguments(options) | {"pad_token_id": 0}
        out = self.model.generate(inputs_embeds=self.embeds, attention_mask=mask, **arguments)
        scores = out.sequences_scores.tolist() if options.num_beams > 1 else [None] * len(mask)
        rows = [row.tolist() for row in out.sequences]
        return [((row[0], *until_end(row[1:], options)), score) for row, score in zip(rows, scores, strict=True)]

    def run(self, options: GenerationOptions) -> list[Generated]:
        state = T5State(self)
        prompts: list[list[int]] = [[] for _ in self.embeds]
        return generate(state.logits(), state, prompts, options, initial=(0,))


class T5State:
    @_no_grad
    def __init__(self, oracle: T5Oracle) -> None:
        self.model = oracle.model
        self.states = oracle.model.encoder(inputs_embeds=oracle.embeds).last_hidden_state
        self.ids = torch.zeros(len(self.states), 1, dtype=torch.long)

    @property
    def batch_size(self) -> int:
        return len(self.ids)

    @_no_grad
    def logits(self) -> NDArray[np.float32]:
        out = self.model(encoder_outputs=(self.states,), decoder_input_ids=self.ids, use_cache=False)
        return out.logits[:, -1].numpy()

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.ids = torch.cat([self.ids, torch.from_numpy(np.array(token_ids))[:, None]], dim=1)
        return self.logits()

    def select(self, rows: NDArray[np.int64]) -> None:
        index = torch.from_numpy(np.array(rows))
        self.ids, self.states = self.ids[index], self.states[index]

    def join(self, other: Any) -> None:
        raise AssertionError("nothing joins here")


@pytest.fixture(scope="session")
def opt_oracle() -> Callable[..., OptOracle]:
    return OptOracle


@pytest.fixture(scope="session")
def t5_oracle() -> Callable[..., T5Oracle]:
    return T5Oracle
