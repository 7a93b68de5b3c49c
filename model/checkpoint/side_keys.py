"""Tables that say what happens to each key of the files next to a checkpoint's weights.

A key is *honoured* (read and used), *neutral* (no value changes a caption), *checked* (only the values in the table are
accepted; any other value would change a caption; the error names the key), or *unread*: transformers 5.23 does not read
it either, so it is named in a warning. ``tests/export/test_side_keys.py`` compares the tables with the installed
transformers, and ``docs/checkpoints.md`` shows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from blip2edge.errors import CheckpointError


@dataclass(frozen=True)
class KeyTable:
    """The keys of one side file.

    Attributes:
        file: Name of the file, or of an object inside the file.
        honoured: Keys that are read and used.
        neutral: Keys that change no caption, whatever their value.
        checked: Values that are accepted, by key. null is always accepted.
    """

    file: str
    honoured: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()
    checked: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def effect(self, key: str) -> str:
        """Returns what happens to a key: ``honoured``, ``neutral``, ``checked`` or ``unread``."""
        if key in self.honoured:
            return "honoured"
        if key in self.neutral:
            return "neutral"
        return "checked" if key in self.checked else "unread"


IMAGE_PROCESSOR = KeyTable(
    "preprocessor_config.json, or image_processor in processor_config.json",
    honoured=(
        "image_processor_type",
        "feature_extractor_type",
        "video_processor_type",
        "do_resize",
        "size",
        "default_to_square",
        "resample",
        "do_center_crop",
        "crop_size",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "image_size",
    ),
    neutral=(
        "do_convert_rgb",  # pictures are always converted to RGB
        "input_data_format",  # of arrays; a file has none
        "pad_size",  # only with do_pad
        "return_tensors",
        "disable_grouping",
        "device",
        "image_seq_length",
        "processor_class",  # compared with the model's by export.side_files
        "_processor_class",
        "auto_map",  # code of the repository; transformers' own class goes before it
        "fps",  # only with do_sample_frames
        "num_frames",
        "video_metadata",
        "return_metadata",
    ),
    checked={
        "do_pad": (False,),
        "data_format": ("channels_first",),
        "image_num_channels": (3,),
        "do_sample_frames": (False,),
    },
)

PROCESSOR = KeyTable(
    "processor_config.json",
    honoured=("image_processor", "video_processor", "chat_template"),
    neutral=(
        "_processor_class",
        "auto_map",
        "tokenizer",
        "qformer_tokenizer",
        "image_size",
        "video_token",
    ),
    checked={"add_end_of_utterance_token": (False,), "vision_feature_select_strategy": ("default", "full")},
)
"""The effect of the keys of ``processor_config.json``.

Export also checks that the keys in :data:`FROM_CONFIG` agree with ``config.json``.
"""

FROM_CONFIG = ("num_query_tokens", "patch_size", "num_additional_image_tokens", "image_token", "processor_class")
"""Keys of ``processor_config.json`` that must agree with ``config.json``."""

GENERATION = KeyTable(
    "generation_config.json",
    honoured=(
        "eos_token_id",
        "max_new_tokens",
        "min_new_tokens",
        "min_length",
        "do_sample",
        "num_beams",
        "early_stopping",
        "length_penalty",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "encoder_repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "sequence_bias",
        "exponential_decay_length_penalty",
        "renormalize_logits",
        "remove_invalid_values",
    ),
    neutral=(
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "max_length",  # max_new_tokens goes before it
        "use_cache",
        "cache_config",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "assistant_ensemble_weight",
        "target_lookbehind",
        "prompt_lookup_num_tokens",  # drafts change no greedy text
        "max_matching_ngram_size",
        "speculation_type",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "low_memory",
        "prefill_chunk_size",
        "_from_model_config",
        "transformers_version",
        "use_mtp",
    ),
    checked={
        "max_time": (),
        "stop_strings": (),
        "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static"),
        "top_h": (),
        "token_healing": (False,),
        "guidance_scale": (1, 1.0),
        "watermarking_config": (),
        "num_return_sequences": (1,),
        "penalty_alpha": (0, 0.0),
        "dola_layers": (),
        "diversity_penalty": (0, 0.0),
        "num_beam_groups": (1,),
        "constraints": (),
        "force_words_ids": (),
    },
)

TOKENIZER = KeyTable(
    "tokenizer_config.json",
    honoured=(
        "tokenizer_class",
        "init_inputs",
        "added_tokens_decoder",
        "additional_special_tokens",
        "extra_special_tokens",
        "model_specific_special_tokens",
        "clean_up_tokenization_spaces",
        "split_special_tokens",
        "post_processor",
        "chat_template",
    ),
    neutral=(
        "model_max_length",  # a prompt that is too long is refused, never cut
        "max_len",
        "model_input_names",
        "padding_side",  # prompts are padded by the runtime
        "truncation_side",
        "tokenizer_truncation",
        "tokenizer_padding",
        "max_length",
        "stride",
        "truncation_strategy",
        "pad_to_multiple_of",
        "pad_token_type_id",
        "token_type_ids_pattern",
        "token_type_ids_include_special_tokens",
        "special_tokens_pattern",  # of tokenizers in Python, which are refused
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        "spaces_between_special_tokens",
        "response_template",
        "response_schema",
        "chat_control_tokens",
        "processor_class",
        "_processor_class",
        "auto_map",
        "_commit_hash",
        "backend",
        "files_loaded",
        "is_local",
        "local_files_only",
        "name_or_path",
        "verbose",
        "transformers_version",
        "special_tokens_map_file",  # these were written by older versions of transformers
        "tokenizer_file",
        "vocab_file",
        "merges_file",
        "use_fast",
        "from_slow",
        "device_map",
        "trust_remote_code",
        "slow_tokenizer_class",
        "sp_model_kwargs",
        "legacy",
        "errors",
        "do_basic_tokenize",
        "never_split",
        "trim_offsets",
        "use_default_system_prompt",
    ),
)
"""The effect of keys of ``tokenizer_config.json`` that are neither an argument of the tokenizer's class nor a token.

All other keys are checked by ``tokenizer_keys.py``.
"""

CONFIG = KeyTable(
    "config.json, and its sections",
    neutral=(
        "architectures",
        "model_type",
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "_attn_implementation_autoset",
        "attn_implementation",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "task_specific_params",
        "use_cache",
        "is_decoder",
        "is_encoder_decoder",
        "attention_dropout",
        "activation_dropout",
        "dropout",
        "dropout_rate",
        "classifier_dropout",
        "layerdrop",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "resid_dropout",
        "initializer_range",
        "initializer_factor",
        "logit_scale_init_value",
        "projection_dim",
        "image_text_hidden_size",
        "label_smoothing",
        "alpha_initializer",
        "alphas_initializer_range",
        "freeze_text_layers",
        "freeze_text_module_exceptions",
        "freeze_lm_head",
        "freeze_vision_layers",
        "freeze_vision_module_exceptions",
        "cross_layer_activation_function",
        "init_std",
        "pretraining_tp",
        "encoder_hidden_size",  # the vision encoder's width is used, as in transformers
        "bos_token_id",  # those of language models are read
        "eos_token_id",
        "pad_token_id",
        "vocab_size",  # of a Q-Former without texts; those of language models are read
        "max_position_embeddings",
        "type_vocab_size",
        "image_seq_length",
        "tie_word_embeddings",  # at the top level; that of the language model is read
        "vision_use_head",  # of SigLIP, whose patches are used
        "use_resampler",  # in perceiver_config; the one at the top level is read
    ),
)
"""Keys of ``config.json`` that this project does not read and that change no caption.

Any other key that this project does not read must not change transformers' config object (``config_keys.py``).
"""


def check_keys(table: KeyTable, values: Mapping[str, Any], where: str) -> list[str]:
    """Compares the keys of a file with the table of this file.

    Args:
        table: What happens to each key.
        values: The file's content.
        where: Name of the file, for messages.

    Returns:
        A list with one warning, which names all keys that are not read; empty if all keys are read.

    Raises:
        CheckpointError: A checked key has a value that would change captions and is not supported.
    """
    for key, accepted in table.checked.items():
        value = values.get(key)
        if value is not None and not any(_same(value, one) for one in accepted):
            raise refused(where, key, value, accepted)
    unread = [key for key, value in values.items() if value is not None and table.effect(key) == "unread"]
    return unread_warning(where, unread)


def refused(where: str, key: str, value: Any, accepted: Iterable[Any] = ()) -> CheckpointError:
    """Makes the error for a key whose value would change captions and is not supported."""
    choices = " or ".join(json_text(one) for one in accepted)
    return CheckpointError(
        f"{where}: {key} is {json_text(value)}, which is not supported",
        f"set it to {choices}, or remove the key" if choices else "remove the key",
    )


def unread_warning(where: str, keys: Iterable[str]) -> list[str]:
    """Returns one warning that names all unread keys; an empty list if there are no such keys."""
    names = ", ".join(keys)
    return [f"{where}: not used, as transformers does not read it either: {names}"] if names else []


def json_text(value: Any) -> str:
    """Formats a JSON value for a message, cut after 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _same(value: Any, accepted: Any) -> bool:
    return type(value) is type(accepted) and bool(value == accepted)
