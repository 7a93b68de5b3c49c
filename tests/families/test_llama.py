"""Llama, Mistral, Qwen2 and SmolLM as language models of BLIP-2, compared with transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from blip2edge import Captioner
from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.export.graphs import DecoderGraph, cache_of, decoder_spec
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.export.to_onnx import trace
from blip2edge.model.language.registry import language_of
from blip2edge.model.weights.rules import WeightMap
from blip2edge.optimization.graph import prepare
from blip2edge.optimization.passes.shared_cache import share_cache
from blip2edge.optimization.pipeline import optimize
from tests.families import drawing_llama as drawing

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5}

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("llama", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    ("llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None, "head_dim": 12}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
)


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_decoder_equals_transformers(variant: int) -> None:
    """A ragged batch in one go, and again with a cache between its halves."""
    from transformers import AutoModelForCausalLM

    kind, changes = VARIANTS[variant]
    theirs = AutoModelForCausalLM.from_config(drawing.text_config(kind, **changes)).eval()
    drawing.draw_weights(theirs, variant)
    row, state = language_of(kind), theirs.state_dict()
    config: Any = row.read_config(theirs.config.to_dict())
    assert row.read_config(config.to_hf()) == config
    ours = row.build(config).eval()
    names = WeightMap(row.rules(config))
    ours.load_state_dict({name: state[names.sources(name)[0]] for name in ours.state_dict()})
    ids = torch.randint(0, drawing.VOCAB, (2, 14), generator=torch.Generator().manual_seed(variant))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        embeds = ours.embed(ids)
        whole, _ = ours(embeds, mask, positions)
        _, past = ours(embeds[:, :8], mask[:, :8], positions[:, :8])
        rest, _ = ours(embeds[:, 8:], mask, positions[:, 8:], None, past)
    valid = mask.bool()
    torch.testing.assert_close(whole[valid], expected[valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rest, expected[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("seed", "variant"),
    [
        pytest.param(0, 0, id="llama"),
        pytest.param(1, 2, id="smollm", marks=pytest.mark.slow),
        pytest.param(2, 4, id="mistral", marks=pytest.mark.slow),
        pytest.param(3, 6, id="qwen2", marks=pytest.mark.slow),
        pytest.param(4, 8, id="qwen3"),
    ],
)
def test_captions_equal_transformers(seed: int, variant: int, tmp_path: Path) -> None:
    """Exported in float32: greedy and beams, batched and single."""
    kind, changes = VARIANTS[variant]
    model, processor = drawing.draw_blip2(tmp_path / "checkpoint", seed, kind, **changes)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    captioner = Captioner.load(tmp_path / "bundle", threads=1)

    def reference(image: Any, prompt: str | None, **options: Any) -> list[int]:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, **options)[0]
        start = inputs["input_ids"].shape[1] if prompt else model.config.num_query_tokens + 1
        return [int(token) for token in ids[start:]]

    prompts = [None, "a photo of", "what is red : dog ?"]
    drawing.assert_same_ids(captioner, reference, prompts, seed)
    record = optimize(tmp_path / "bundle").record
    fast = Captioner.load(tmp_path / "bundle", threads=1)
    assert sorted(fast.graphs.copied) == sorted(record.graphs)
    drawing.assert_same_ids(fast, reference, prompts, seed)


@pytest.mark.parametrize(
    ("variant", "window"),
    [(0, -1), (4, 5), *(pytest.param(other, -1, marks=pytest.mark.slow) for other in (1, 2, 3, 6))],
)
def test_a_cache_can_be_shared(variant: int, window: int, tmp_path: Path) -> None:
    """The mask is recognised by what it hides, a sliding window included."""
    kind, changes = VARIANTS[variant]
    changes = {**changes, "head_dim": 16}  # the kernel turns no narrower heads
    config: Any = language_of(kind).read_config(drawing.text_config(kind, **changes).to_dict())
    with torch.device("meta"):
        language = language_of(kind).build(config).eval()
    holder = SimpleNamespace(language=language, config=SimpleNamespace(language=config))
    spec = decoder_spec(holder.config)
    model = trace(DecoderGraph(holder), spec).model  # type: ignore[arg-type]
    prepare(model)
    for name, value in model.graph.initializers.items():  # traced without weights
        if value.const_value is None:
            value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=name)  # type: ignore[union-attr]
    assert share_cache(model, cache_of(holder.config), config.max_positions)
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == config.num_layers
    assert {node.attributes["local_window_size"].as_int() for node in nodes} == {window}
    assert "attention_mask" not in {value.name for value in model.graph.inputs}


@pytest.mark.slow
def test_fp16_keeps_positions_in_fp32(tmp_path: Path) -> None:
    """A theta beyond fp16's range, and angles, stay as they are."""
    drawing.draw_blip2(tmp_path / "checkpoint", 0, "llama", rope_parameters=LINEAR)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp16")
    captioner = Captioner.load(tmp_path / "bundle", threads=1)
    record = captioner.bundle.manifest.graphs["decoder"]
    assert any(reason.startswith("rotary positions:") for reason in record.fp32_exceptions)
    logits = next(parity for parity in record.parity if parity.output == "logits")
    assert logits.relative < 1e-2
    assert captioner.caption(drawing.pictures(0)[0], prompt="a photo", max_new_tokens=3).tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary positions of kind 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "over a part of each head"),
        ({"num_key_value_heads": 3}, "3 heads of keys do not divide 4 heads of queries"),
        ({"head_dim": 7}, "even head_dim"),
        ({"hidden_act": "xielu"}, "text_config.hidden_act is 'xielu'"),
    ],
)
def test_what_is_not_supported_is_one_line(changes: dict[str, Any], message: str) -> None:
    """The key that is wrong stands in the message."""
    values = drawing.text_config("llama").to_dict() | changes
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as caught:
        language_of("llama").read_config(values)
    assert "\n" not in str(caught.value)
