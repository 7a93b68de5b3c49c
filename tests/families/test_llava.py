"""LLaVA compared with transformers: CLIP's encoder, the MLP, pictures in the middle of a chat."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2edge import Captioner
from blip2edge.errors import CheckpointError, PromptError, UnsupportedModelError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from blip2edge.model.checkpoint.tokenizer import read_tokenizer
from blip2edge.model.families.registry import read_config
from blip2edge.runtime.serving.openai_api import read_request
from blip2edge.training.data.sources import Sample
from blip2edge.training.loading.caption_texts import CaptionTexts
from tests.families import drawing_llama as drawing

FULL = {
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": 2,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "relu",
}

SIGLIP = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
"""As in llava-interleave."""

CHAT = (
    "{{ bos_token }}{% for message in messages %}[INST] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %} [/INST]{% endfor %}"
)
"""Another chat: BOS within the template, the picture right before the text."""

PROMPTS = ["what is it ?", "a red dog : where", None]


def reference_of(model: Any, processor: Any, template: str, default: str) -> drawing.Reference:
    """transformers' own processor and ``generate`` on the same filled string."""

    def reference(image: Any, prompt: str | None, **options: Any) -> list[int]:
        text = template.replace("{prompt}", default if prompt is None else prompt)
        inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, **options)[0]
        return [int(token) for token in ids[inputs["input_ids"].shape[1] :]]

    return reference


@pytest.mark.parametrize(
    ("seed", "drawn"),
    [
        pytest.param(0, {}, id="llama"),
        pytest.param(1, {"llava": FULL, "tie_word_embeddings": True}, id="full", marks=pytest.mark.slow),
        pytest.param(2, {"model_type": "mistral", "sliding_window": 9}, id="mistral", marks=pytest.mark.slow),
        pytest.param(3, {"model_type": "qwen2", "eos_token_id": [2, 40]}, id="qwen2"),
        pytest.param(4, {"siglip": True, "model_type": "qwen2", "llava": SIGLIP}, id="siglip"),
        pytest.param(5, {"siglip": True}, id="siglip, first patch dropped", marks=pytest.mark.slow),
    ],
)
def test_answers_equal_transformers(seed: int, drawn: dict[str, Any], tmp_path: Path) -> None:
    """Exported in float32: greedy and beams, batched and single, pictures of several sizes."""
    model, processor = drawing.draw_llava(tmp_path / "checkpoint", seed, **drawn)
    template = "USER: <image>\n{prompt} ASSISTANT:"
    if seed == 2:
        processor.chat_template = CHAT
        processor.save_pretrained(tmp_path / "checkpoint")
        template = "[INST] <image> {prompt} [/INST]"
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    captioner = Captioner.load(tmp_path / "bundle", threads=1)
    assert captioner.prompts.spec.template == template.replace("<image>", "{image}")
    reference = reference_of(model, processor, template, "Describe the image concisely.")
    drawing.assert_same_ids(captioner, reference, PROMPTS, seed)
    question = "where is it ?"
    image = drawing.pictures(seed)[1]
    assert list(captioner.ask(image, question, max_new_tokens=8).tokens) == reference(image, question, max_new_tokens=8)


def test_eos_comes_from_generation_config(tmp_path: Path) -> None:
    """LLaVA generates by its own generation_config, not by the language model's config."""
    drawing.draw_llava(tmp_path / "checkpoint", 0)
    path = tmp_path / "checkpoint" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 9]}))
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp16")
    captioner = Captioner.load(tmp_path / "bundle", threads=1)
    assert captioner.options().eos_token_ids == (7, 9)
    with pytest.raises(PromptError, match="<image>, which marks a picture"):
        captioner.caption(drawing.pictures(0)[0], prompt="two <image> of a dog")


def test_training_texts_and_evaluation_end_as_the_bundle_does(tmp_path: Path) -> None:
    """The last label is a token at which generation stops; config.json's own end token is preferred among them."""
    directory = tmp_path / "checkpoint"
    drawing.draw_llava(directory, 0)
    path = directory / "generation_config.json"
    values = json.loads(path.read_text())
    own = load_checkpoint(directory).config.eos_token_ids[0]
    samples = [Sample("0", "0", lambda: drawing.pictures(0)[0], "a red dog", "what is it ?")]
    for ends, last in (([7, 9], 7), ([7, own], own), (9, 9), (None, own)):
        path.write_text(json.dumps(values | {"eos_token_id": ends}))
        model = load_checkpoint(directory)
        assert model.config.eos_token_ids == (own,)
        assert set(model.config.ends) == {*(ends if isinstance(ends, list) else [last])}
        labels = CaptionTexts(model.config, read_tokenizer(directory).open(), 16)(samples).labels
        assert labels[0, -1] == last
    path.unlink()
    assert load_checkpoint(directory).config.ends == (own,)


VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The chat of LLaVA 1.5, with the end of an answer that Vicuna was trained with."""


def test_a_conversation_equals_transformers(tmp_path: Path) -> None:
    """A system message and earlier turns are in the prompt as the checkpoint's chat template writes them."""
    model, processor = drawing.draw_llava(tmp_path / "checkpoint", 3)
    processor.chat_template = VICUNA
    processor.save_pretrained(tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", verify="sample")
    captioner = Captioner.load(tmp_path / "bundle", threads=1)
    image = drawing.pictures(3)[0]
    picture = {"type": "image"}
    talk = [
        {"role": "system", "content": [{"type": "text", "text": "a red dog"}]},
        {"role": "user", "content": [picture, {"type": "text", "text": "what is it ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two cats"}]},
        {"role": "user", "content": [{"type": "text", "text": "and where ?"}]},
    ]
    spec = captioner.prompts.spec
    for messages in (talk, talk[1:], [talk[3], talk[2], talk[1]], [talk[0], talk[1]], talk[1:2]):
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=image.convert("RGB"), text=text.removeprefix("<s>"), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        request = read_request(_body(messages, image), spec)
        assert request.prompt is not None
        assert captioner.prompts(request.prompt).ids == inputs["input_ids"][0].tolist()
        with captioner.scheduler() as scheduler:
            made = scheduler.submit(image, captioner.options(max_new_tokens=8), prompt=request.prompt).result(60)
        assert list(made.tokens) == ids[inputs["input_ids"].shape[1] :].tolist()
    typed = read_request(_body([talk[1], {"role": "assistant", "content": "x</s>USER: "}, talk[3]], image), spec)
    with pytest.raises(PromptError, match="contains </s>, which is a special token"):
        captioner.prompts(typed.prompt)


def _body(messages: list[dict[str, Any]], image: Any) -> bytes:
    """A chat request in OpenAI's format for messages in transformers' format."""
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    return json.dumps({"messages": messages}).replace('{"type": "image"}', json.dumps(part)).encode()


def test_prompt_ids_equal_the_processors(tmp_path: Path) -> None:
    """The ids that the repetition penalty sees are transformers' input_ids."""
    from blip2edge.bundle.prompt_spec import PromptSpec
    from blip2edge.runtime.text.prompt import PromptBuilder
    from blip2edge.runtime.text.tokenizer import Tokenizer

    _, processor = drawing.draw_llava(tmp_path, 0)
    spec = PromptSpec(
        "USER: {image}\n{prompt} ASSISTANT:",
        "{question}",
        9,
        1,
        drawing.IMAGE_ID,
        image_token="<image>",
        kind="placeholder",
    )
    prompter = PromptBuilder(spec, Tokenizer.from_file(tmp_path / "tokenizer.json"), 96, drawing.VOCAB)
    for prompt in ("what is it ?", "", "{image} dog", "  a   photo\nof"):
        text = f"USER: <image>\n{prompt} ASSISTANT:"
        image = drawing.pictures(0)[0]
        expected = processor(images=image, text=text, return_tensors="pt")["input_ids"][0].tolist()
        assert prompter(prompt).ids == expected


RENAMED: dict[str, Callable[[str], str]] = {
    "4.5x": lambda name: re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name),
    "unprefixed": lambda name: re.sub(
        r"^(vision_tower|multi_modal_projector|model\.language_model)\.",
        r"model.\1.",
        re.sub(r"^language_model\.lm_head", "lm_head", name).replace("language_model.model.", "model.language_model."),
    ).replace("model.model.", "model."),
}


@pytest.mark.parametrize("version", sorted(RENAMED))
def test_names_of_other_versions(version: str, tmp_path: Path) -> None:
    """What transformers wrote before, and what its modules are called now, load alike."""
    drawing.draw_llava(tmp_path, 1)
    ours = load_checkpoint(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {RENAMED[version](name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load_checkpoint(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


@pytest.mark.filterwarnings("ignore")
def test_saved_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    """The tower that is written ends at the layer whose features are used."""
    from transformers import LlavaForConditionalGeneration

    model, _ = drawing.draw_llava(tmp_path / "theirs", 4)
    save_checkpoint(load_checkpoint(tmp_path / "theirs"), tmp_path / "ours", like=tmp_path / "theirs")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor([[1, *[drawing.IMAGE_ID] * 9, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 24, 24)}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, "features of 2 vision layers"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "class LlavaLlamaForCausalLM, which is not supported"),
        ({"vision_feature_layer": -9}, r"vision_feature_layer must be from 1 to 3, or from -3 to -1 .*, not -9"),
        ({"vision_feature_select_strategy": "cls"}, "must be default or full"),
        ({"vision_config": {"model_type": "dinov2"}}, "'dinov2'"),
        ({"text_config": {"model_type": "gemma"}}, "language model is of type 'gemma'"),
        ({"projector_hidden_act": "mish"}, "projector_hidden_act is 'mish'"),
    ],
)
def test_what_is_not_supported_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The key that is wrong stands in the message."""
    values = json.loads(json.dumps(_config(tmp_path))) | changes
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as caught:
        read_config(values)
    assert "\n" not in str(caught.value)


def _config(directory: Path) -> dict[str, Any]:
    drawing.draw_llava(directory, 0)
    values: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return values


def test_side_files_that_do_not_fit(tmp_path: Path) -> None:
    """A tokenizer without the picture's token, one of another vocabulary, and no processor: one line each."""
    drawing.draw_llava(tmp_path, 0)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"image_token_index": 5}))
    with pytest.raises(CheckpointError, match=r"gives <image> the id 119, but config\.json says"):
        export_checkpoint(tmp_path, tmp_path / "bundle")
    config.write_text(json.dumps(values))
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        export_checkpoint(tmp_path, tmp_path / "bundle")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        export_checkpoint(tmp_path, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
