"""The files next to a checkpoint's weights: keys and values that :mod:`tests.side_file_draws` draws."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from blip2edge.model.checkpoint.side_keys import IMAGE_PROCESSOR

Change = tuple[str, str, str, Any]
"""What was changed: the file, the section in it, the key and the value."""

TOKENIZER_KEYS: dict[str, tuple[Any, ...]] = {
    "clean_up_tokenization_spaces": (True, False),
    "split_special_tokens": (True, False),
    "add_prefix_space": (True, False),
    "do_lower_case": (True, False),
    "strip_accents": (True, False),
    "tokenizer_class": (
        "BertTokenizer",
        "GPT2Tokenizer",
        "LlamaTokenizer",
        "T5Tokenizer",
        "PreTrainedTokenizerFast",
        None,
    ),
    "eos_token": ("a", "dog", "</s>"),
    "bos_token": ("a", "<s>", "</s>"),
    "unk_token": ("<unk>", "a"),
    "pad_token": ("<pad>", "a"),
    "cls_token": ("a", "[SEP]"),
    "sep_token": ("[CLS]", "?"),
    "video_token": ("<video>", "a"),
    "extra_special_tokens": (["dog"], {"image_token": "<image>"}, []),
    "additional_special_tokens": (["dog"], []),
    "add_bos_token": (True, False),
    "add_eos_token": (True, False),
    "legacy": (True, False),
    "model_max_length": (3, 512),
    "padding_side": ("left", "right"),
    "truncation_side": ("left", "right"),
    "use_default_system_prompt": (True,),
    "spaces_between_special_tokens": (True, False),
    "processor_class": ("Blip2Processor", "LlavaProcessor"),
    "favourite": (1,),
    "favourite_token_kind": ("<image>",),
}

PROCESSOR_KEYS: dict[str, tuple[Any, ...]] = {
    "num_query_tokens": (4, 5, 9),
    "patch_size": (7, 8),
    "vision_feature_select_strategy": ("default", "full"),
    "num_additional_image_tokens": (0, 1, 2),
    "image_token": ("<image>", "a"),
    "image_size": (24, 32),
    "add_end_of_utterance_token": (True, False),
    "video_token": ("<video>", "a"),
    "processor_class": ("Blip2Processor", "BlipProcessor", "InstructBlipProcessor", "LlavaProcessor"),
    "favourite": (1,),
}

IMAGE_VALUES: dict[str, tuple[Any, ...]] = {
    "image_processor_type": (
        "BlipImageProcessor",
        "BlipImageProcessorFast",
        "CLIPImageProcessor",
        "SiglipImageProcessor",
        "ViTImageProcessor",
        "BitImageProcessor",
        "LlavaImageProcessor",
        "IdeficsImageProcessor",
        "ConvNextImageProcessor",
        "InstructBlipVideoImageProcessor",
    ),
    "video_processor_type": ("InstructBlipVideoVideoProcessor", "LlavaNextVideoVideoProcessor"),
    "feature_extractor_type": ("CLIPFeatureExtractor", "ViTFeatureExtractor"),
    "size": (24, 32, {"height": 32, "width": 32}, {"height": 24, "width": 24}, {"shortest_edge": 32}, [32, 32]),
    "crop_size": (24, 32, {"height": 32, "width": 32}, {"height": 24, "width": 24}),
    "resample": (0, 1, 2, 3, 4, 5),
    "rescale_factor": (1 / 255, 1 / 127.5, 0.01),
    "image_mean": ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], 0.5),
    "image_std": ([0.5, 0.5, 0.5], [0.9, 0.8, 0.7], 0.5),
    "image_size": (24, 32),
    "data_format": ("channels_first", "channels_last"),
}

GENERATION_VALUES: dict[str, tuple[Any, ...]] = {
    "eos_token_id": (2, 5, [7, 9], list(range(20, 60))),
    "num_beams": (1, 3),
    "repetition_penalty": (1.0, 1.8),
    "no_repeat_ngram_size": (0, 1, 2),
    "suppress_tokens": ([], list(range(30, 80))),
    "begin_suppress_tokens": (list(range(30, 80)),),
    "bad_words_ids": ([[40], [41]], [[index] for index in range(30, 80)]),
    "forced_bos_token_id": (5,),
    "forced_eos_token_id": (5, 2),
    "sequence_bias": ([[[index], -20.0] for index in range(30, 80)],),
    "encoder_repetition_penalty": (1.0, 2.0),
    "encoder_no_repeat_ngram_size": (0, 1),
    "exponential_decay_length_penalty": ([2, 3.0],),
    "length_penalty": (1.0, -2.0, 3.0),
    "early_stopping": (True, False, "never"),
    "min_new_tokens": (0, 4),
    "min_length": (0, 30),
    "max_length": (5, 20, 4096),
    "temperature": (0.3, 1.0),
    "top_k": (1, 50),
    "top_p": (0.5, 1.0),
    "do_sample": (True, False),
    "guidance_scale": (1.0, 2.0),
    "num_beam_groups": (1, 3),
    "num_return_sequences": (1, 2),
    "renormalize_logits": (True,),
    "cache_implementation": ("dynamic", "static"),
    "favourite": (1,),
}

TOKENIZER_FILE_VALUES: dict[str, tuple[Any, ...]] = {
    "truncation": (None, {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    "padding": (
        {
            "strategy": {"Fixed": 12},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    ),
    "normalizer": (None, {"type": "Lowercase"}),
    "post_processor": (None,),
    "pre_tokenizer": ({"type": "WhitespaceSplit"}, {"type": "Whitespace"}),
}
"""Values of ``tokenizer.json``."""


def _parts(text: str, picture: str = "<image>", order: str = "") -> str:
    """The part of a chat template that writes a message's parts."""
    return (
        f"{{% for part in message['content']{order} %}}{{% if part['type'] == 'image' %}}{picture}{{% else %}}"
        f"{{{{ {text} }}}}{{% endif %}}{{% endfor %}}"
    )


def _each(text: str) -> str:
    return f"{{% for message in messages %}}{text}{{% endfor %}}"


WRITTEN = _parts("part['text']", "<image>\n")
CHAT_TEMPLATES: tuple[str, ...] = (
    "{{ bos_token }}" + _each(f"USER: {WRITTEN} ") + "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    _each(f"a red dog : {WRITTEN}"),
    "<s>" + _each(f"Human : {WRITTEN}</s>") + "Assistant :",
    _each(_parts("part['text']", order=" | reverse")),
    _each(_parts("part['text'] | trim")) + " a photo",
    _each(_parts("part['text'] | upper")),
    "{{ strftime_now('%Y') }} " + _each(WRITTEN),
    _each("{{ message['role'] + ': ' + message['content'] }}"),
    _each("{{ message['role'] }}: {{ message['content'][-1]['text'] }}"),
    "{{ raise_exception('no chats') }}",
)

OTHER_VALUES: tuple[Any, ...] = (True, False, None, 0, 1, 2, 3, 0.5, 1.5, "relu", "gelu")
"""Values of a key without a list of its own."""

ABSENT = "(absent)"
"""Value of a key that is removed."""


def change(directory: Path, rng: random.Random) -> Change:
    """Changes one key of one file in place."""
    changes = [_config, _processor, _tokenizer, _pictures, _chat_template]
    if (directory / "generation_config.json").is_file():
        changes.append(_generation)
    return rng.choice(changes)(directory, rng)


def _config(directory: Path, rng: random.Random) -> Change:
    values = read(directory / "config.json")
    section = rng.choice(["", *(key for key, inner in values.items() if isinstance(inner, dict))])
    part = values[section] if section else values
    key = rng.choice(sorted(key for key, value in part.items() if not isinstance(value, dict)))
    return _set(directory / "config.json", section, key, rng.choice((*OTHER_VALUES, ABSENT)))


def _generation(directory: Path, rng: random.Random) -> Change:
    known = {key: GENERATION_VALUES.get(key, OTHER_VALUES) for key in GenerationConfig().to_dict()}
    return _set(directory / "generation_config.json", "", *_pick(known | GENERATION_VALUES, rng))


def _processor(directory: Path, rng: random.Random) -> Change:
    return _set(directory / "processor_config.json", "", *_pick(PROCESSOR_KEYS, rng))


def _tokenizer(directory: Path, rng: random.Random) -> Change:
    """A file of the tokenizer, or of the Q-Former's own."""
    name = rng.choice(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"])
    folders = [folder for folder in ("", "qformer_tokenizer") if (directory / folder / "tokenizer.json").is_file()]
    path = directory / rng.choice(folders) / name
    if name == "added_tokens.json":
        return _set(path, "", "dog", rng.choice([7, 500]))
    if name == "tokenizer.json":
        return _set(path, "", *_pick(TOKENIZER_FILE_VALUES, rng))
    keys = {key: values for key, values in TOKENIZER_KEYS.items() if name == "tokenizer_config.json" or "token" in key}
    key, value = _pick(keys, rng)
    return _set(path, "", key, rng.choice([value, value, ABSENT]))


def _pictures(directory: Path, rng: random.Random) -> Change:
    """The settings of pictures: nested, in a file of their own, or in both."""
    known = {key: IMAGE_VALUES.get(key, (True, False, None)) for key in IMAGE_PROCESSOR.honoured}
    extra = {
        "do_pad": (True, False),
        "do_convert_rgb": (True, False),
        "crop_pct": (0.9,),
        "processor_class": PROCESSOR_KEYS["processor_class"],
        "image_num_channels": (1, 3),
    }
    key, value = _pick(known | extra, rng)
    value = rng.choice([value, value, value, ABSENT])
    nested = directory / "processor_config.json"
    values = read(nested)
    part = next(name for name in ("video_processor", "image_processor") if name in values)
    place = rng.choice(["nested", "nested", "file", "both", "the other kind"])
    if place == "nested":
        return _set(nested, part, key, value)
    if place == "the other kind":
        part = "image_processor" if part == "video_processor" else "video_processor"
        return _set(nested, part, key, value)
    settings = values[part] if place == "both" else values.pop(part)
    nested.write_text(json.dumps(values))
    files = ["preprocessor_config.json", *(["video_preprocessor_config.json"] if part == "video_processor" else [])]
    path = directory / rng.choice(files)
    path.write_text(json.dumps(settings))
    file, section, key, value = _set(path, "", key, value)
    return f"{file} ({place})", section, key, value


def _chat_template(directory: Path, rng: random.Random) -> Change:
    value = rng.choice(CHAT_TEMPLATES)
    name = rng.choice(
        [
            "chat_template.jinja",
            "chat_template.json",
            "processor_config.json",
            "tokenizer_config.json",
            "additional_chat_templates/default.jinja",
            "additional_chat_templates/rag.jinja",
        ]
    )
    path = directory / name
    if path.suffix == ".jinja":
        path.parent.mkdir(exist_ok=True)
        path.write_text(value)
        return name, "", "chat_template", value
    return _set(path, "", "chat_template", value)


def _pick(pool: dict[str, tuple[Any, ...]], rng: random.Random) -> tuple[str, Any]:
    key = rng.choice(sorted(pool))
    return key, rng.choice(pool[key])


def read(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _set(path: Path, section: str, key: str, value: Any) -> Change:
    values = read(path)
    part = values.setdefault(section, {}) if section else values
    part[key] = value
    if value is ABSENT:
        del part[key]
    path.write_text(json.dumps(values))
    folder = "qformer_tokenizer/" if path.parent.name == "qformer_tokenizer" else ""
    return folder + path.name, f"{section}." if section else "", key, value
