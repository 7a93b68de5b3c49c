"""MiniGPT-4 (BLIP-2's parts, picture in the middle of the prompt), compared with modules of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2edge import Captioner
from blip2edge.errors import UnsupportedModelError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from tests.families import drawing_llama as drawing

BEFORE, BEHIND = "###Human: <Img>", "</Img> {prompt}###Assistant:"
DEFAULT = "Describe this image in detail."


def reference_of(model: Any, processor: Any) -> drawing.Reference:
    """Vision model, Q-Former and projection of Blip2, then ``LlamaForCausalLM.generate``.

    The published code (Vision-CAIR/MiniGPT-4, ``get_context_emb``) tokenises what stands before the picture with a
    BOS and what stands behind it without.
    """

    def reference(image: Any, prompt: str | None, **options: Any) -> list[int]:
        pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        before = processor.tokenizer(BEFORE, add_special_tokens=True)["input_ids"]
        behind = processor.tokenizer(
            BEHIND.replace("{prompt}", DEFAULT if prompt is None else prompt), add_special_tokens=False
        )["input_ids"]
        slots = [model.config.image_token_index] * model.config.num_query_tokens
        language = model.language_model
        with torch.no_grad():
            patches = model.vision_model(pixel_values=pixels).last_hidden_state
            queries = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=patches)
            visual = model.language_projection(queries.last_hidden_state)
            parts = [
                language.get_input_embeddings()(torch.tensor([before])),
                visual,
                language.get_input_embeddings()(torch.tensor([behind])),
            ]
            ids = torch.tensor([[*before, *slots, *behind]])
            generated = language.generate(
                input_ids=ids,
                inputs_embeds=torch.cat(parts, dim=1),
                attention_mask=torch.ones_like(ids),
                **options,
            )
        return [int(token) for token in generated[0, ids.shape[1] :]]

    return reference


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        pytest.param(0, {}, id="grouped"),
        pytest.param(1, {"num_key_value_heads": 4}, id="vicuna", marks=pytest.mark.slow),
        pytest.param(2, {"tie_word_embeddings": True}, id="tied", marks=pytest.mark.slow),
    ],
)
def test_answers_equal_transformers(seed: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Exported in float32: greedy and beams, batched and single, with and without the penalty."""
    model, processor = drawing.draw_minigpt4(tmp_path / "checkpoint", seed, **changes)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    captioner = Captioner.load(tmp_path / "bundle", threads=1)
    assert captioner.options().stop == ("###",)
    prompts = ["what is it ?", "a red dog : where", None]
    drawing.assert_same_ids(captioner, reference_of(model, processor), prompts, seed, stop=())


def test_stops_where_the_other_speaker_would_begin(tmp_path: Path) -> None:
    """Vicuna ends its turn with ``###`` instead of an end token; that is neither shown nor gone on from."""
    drawing.draw_minigpt4(tmp_path / "checkpoint", 1)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp16")
    captioner = Captioner.load(tmp_path / "bundle", threads=1)
    image = drawing.pictures(1)[0]
    whole = captioner.caption(image, max_new_tokens=8, stop=())
    word = captioner.tokenizer.id_to_token(whole.tokens[3])
    stopped = captioner.caption(image, max_new_tokens=8, stop=(str(word),))
    assert stopped.finish_reason == "stop"
    assert str(word) not in stopped.text
    assert len(stopped.tokens) <= 4
    assert [one.text for one in captioner.words(stopped)] == stopped.text.split()


def test_saved_again(tmp_path: Path) -> None:
    """Config and weights survive a round trip; BLIP-2's class of the same tensors is another family."""
    drawing.draw_minigpt4(tmp_path / "one", 2)
    model = load_checkpoint(tmp_path / "one")
    save_checkpoint(model, tmp_path / "two", like=tmp_path / "one")
    again = load_checkpoint(tmp_path / "two")
    assert again.config == model.config
    assert again.config.family == "minigpt4"
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_an_unknown_family_is_one_line(tmp_path: Path) -> None:
    """The message names what is supported."""
    drawing.draw_minigpt4(tmp_path, 0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "minigpt5"}))
    with pytest.raises(UnsupportedModelError, match=r"'minigpt5'.*minigpt4") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
