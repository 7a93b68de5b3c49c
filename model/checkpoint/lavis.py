"""Opens checkpoints of LAVIS: merges the trained modules in a ``.pth`` with the frozen modules from a directory.

A ``.pth`` of salesforce/LAVIS (and of MiniGPT-4, which is built on it) is ``{"model": state_dict}`` with the
parameters that were trained: the Q-Former and ``ln_vision`` after stage 1; these and the projection after stage 2;
also the vision encoder if it was fine-tuned; only the projection for MiniGPT-4. All other weights come from a
checkpoint directory of a model with the same sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from blip2edge.errors import CheckpointError, UsageError, option, some
from blip2edge.model.checkpoint.adapters.folder import has_adapter
from blip2edge.model.checkpoint.directory import Checkpoint
from blip2edge.model.checkpoint.stored.files import find_checkpoint, is_lavis, local_checkpoint
from blip2edge.model.checkpoint.stored.pickled import Ignored, read_pickled, save_again
from blip2edge.model.weights.rules import BUFFERS
from blip2edge.model.weights.ties import stored_names

_VIT = r"visual_encoder\.blocks\.(\d+)\."
_LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."

RENAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"query_tokens", (r"query_tokens",)),
    (r"ln_vision\.(.+)", (r"vision_model.post_layernorm.\1",)),
    (r"visual_encoder\.cls_token", (r"vision_model.embeddings.class_embedding",)),
    (r"visual_encoder\.pos_embed", (r"vision_model.embeddings.position_embedding",)),
    (r"visual_encoder\.patch_embed\.proj\.(.+)", (r"vision_model.embeddings.patch_embedding.\1",)),
    (_VIT + r"norm([12])\.(.+)", (r"vision_model.encoder.layers.\1.layer_norm\2.\3",)),
    (_VIT + r"attn\.qkv\.weight", (r"vision_model.encoder.layers.\1.self_attn.qkv.weight",)),
    (_VIT + r"attn\.qkv_bias", (r"vision_model.encoder.layers.\1.self_attn.qkv.bias",)),
    (_VIT + r"attn\.proj\.(.+)", (r"vision_model.encoder.layers.\1.self_attn.projection.\2",)),
    (_VIT + r"mlp\.(.+)", (r"vision_model.encoder.layers.\1.mlp.\2",)),
    (
        r"Qformer\.bert\.embeddings\.LayerNorm\.(.+)",
        (r"qformer.layernorm.\1", r"qformer.embeddings.layernorm.\1"),
    ),
    (r"Qformer\.bert\.embeddings\.(.+)", (r"qformer.embeddings.\1", r"embeddings.\1")),
    (_LAYER + r"(attention|crossattention)\.self\.(.+)", (r"qformer.encoder.layer.\1.\2.attention.\3",)),
    (_LAYER + r"(.+)", (r"qformer.encoder.layer.\1.\2",)),
    (r"(?:opt|t5|llm|llama)_proj\.(.+)", (r"language_projection.\1",)),
    (r"(?:opt|t5|llm|llama)_model\.(.+)", (r"language_model.\1",)),
    (r"(vision|text)_proj\.(.+)", (r"\1_projection.\2",)),
    (r"(itm_head\..+)", (r"\1",)),
)
"""Maps LAVIS' tensor names (regular expressions) to transformers' names.

If there are several names, the first that the directory's checkpoint has is used.
"""

UNUSED = (
    r"temp",
    r"(vision_proj|text_proj|itm_head)\..+",
    r"Qformer\.cls\..+",
    r"Qformer\.bert\.embeddings\..+",
    _LAYER + r"(intermediate|output)\..+",
)
"""Tensors of BLIP-2's first training stage (ITC, ITM) and of the Q-Former's text layers (regular expressions).

A ``.pth`` of LAVIS is read together with a directory in transformers' format, the base. A tensor of this list is
ignored if the model in the base directory does not have it.
"""

PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qformer.", ("qformer.", "query_tokens")),
    ("language_projection.", ("language_projection.",)),
    ("vision_model.post_layernorm.", ("vision_model.post_layernorm.",)),
    ("vision_model.encoder.", ("vision_model.encoder.", "vision_model.embeddings.")),
    ("language_model.", ("language_model.",)),
)
"""Parts of the model of which a ``.pth`` has all tensors or none.

If a tensor's name starts with the first entry of a row, the file must have every tensor whose name starts with a prefix
in the second entry.
"""


def open_checkpoint(checkpoint: str | Path, base: str | Path | None = None) -> Checkpoint:
    """Opens a directory, a hub name, a PEFT adapter with its base, or a ``.pth`` of LAVIS with its base.

    Args:
        checkpoint: The checkpoint to open.
        base: Checkpoint directory or hub name with the frozen weights for a ``.pth`` or an adapter.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not fit its config or its base.
        MissingPackageError: The checkpoint has an adapter, and peft is not installed.
        UsageError: A ``.pth`` without a base, or a base for a checkpoint that needs none.
    """
    path = Path(checkpoint)
    if not is_lavis(path):
        directory = find_checkpoint(checkpoint)
        if base is not None and not has_adapter(directory):
            raise UsageError(
                f"{option('base')} is for a .pth of LAVIS or a PEFT adapter, but {checkpoint} is neither",
                f"leave {option('base')} out",
            )
        return Checkpoint(directory, None if base is None else find_checkpoint(base))
    if base is None:
        raise UsageError(
            f"{path} holds only the trained parts",
            f"give the directory with the frozen parts: {option('base')} DIRECTORY",
        )
    source = Checkpoint(find_checkpoint(base))
    source.lay_over(translate(read_lavis(path), source, path), path)
    return source


def read_lavis(path: Path) -> dict[str, Tensor]:
    """Reads the state dict of a ``.pth``, mapped into memory. No code in the file is run; other objects are ignored.

    Raises:
        CheckpointError: The file is missing, broken, or not in LAVIS' format.
    """
    local_checkpoint(path)
    content = read_pickled(path)
    state = content.get("model")
    if isinstance(state, Mapping):
        others = sorted(str(name) for name, value in state.items() if not isinstance(value, Tensor))
        if not others:
            return {str(name): value for name, value in state.items()}
        problem = f"{path} cannot be read as a file of tensors: {some(others)} of its model is no tensor"
    elif isinstance(state, Ignored):
        problem = f"{path} cannot be read as a file of tensors: its model is an object, not tensors by name"
    else:
        problem = f'{path} is no checkpoint of LAVIS: expected {{"model": tensors by name}}, found ' + (
            some(sorted(content)) or "nothing"
        )
    raise CheckpointError(problem, save_again(path))


def translate(state: Mapping[str, Tensor], base: Checkpoint, path: Path) -> dict[str, Tensor]:
    """Renames the tensors of LAVIS to transformers' names.

    Args:
        state: LAVIS' tensors.
        base: The checkpoint with the frozen weights.
        path: The ``.pth`` file, for errors.

    Raises:
        CheckpointError: A tensor is unknown, or a trained module lacks some of its tensors.
    """
    shapes = base.files.shapes
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in _with_whole_biases(state, path).items():
        if any(re.fullmatch(pattern, name) for pattern in BUFFERS):
            continue
        ours = next((candidate for candidate in _candidates(name) if candidate in shapes), None)
        if ours is not None:
            found[ours] = tensor
        elif not any(re.fullmatch(pattern, name) for pattern in UNUSED):
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors that the base does not have: {some(sorted(unknown))}",
            f"give the {option('base')} that this file was trained on",
        )
    tied = stored_names(base.ties, found)
    found |= {name: found[stored] for name, stored in tied.items() if base.files.same(name, stored)}
    wrong = sorted(
        name for name, tensor in found.items() if not tensor.is_floating_point() or tensor.element_size() < 2
    )
    if wrong:
        raise CheckpointError(
            f"{path} holds {some(wrong)} as {str(found[wrong[0]].dtype)[6:]}, but weights must be in floating point",
            "save it in float32, float16 or bfloat16",
        )
    needed = {name for part in _touched(found) for name in shapes if name.startswith(part)}
    missing = sorted(name for name in needed - found.keys() if not base.map.is_left_out(name))
    if missing:
        raise CheckpointError(
            f"{path} holds an incomplete part of the model: it lacks {some(missing)}",
            "copy or download it again",
        )
    if not found:
        raise CheckpointError(f"{path} holds no tensor of the model", "give a .pth that LAVIS wrote")
    return found


def _candidates(name: str) -> list[str]:
    for pattern, targets in RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return [match.expand(target) for target in targets]
    return []


def _touched(found: Mapping[str, Tensor]) -> set[str]:
    """Returns the prefixes of the names of all tensors that a ``.pth`` file must have.

    If the file has one tensor of a part of the model (:data:`PARTS`), it must have all tensors of this part. ``found``
    are the tensors in the file.
    """
    return {prefix for part, prefixes in PARTS if any(name.startswith(part) for name in found) for prefix in prefixes}


def _with_whole_biases(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Concatenates each ``q_bias`` and ``v_bias`` to one ``qkv_bias``: (q, 0, v).

    The bias of the keys is 0, because keys have no bias (BEiT, arXiv 2106.08254).
    """
    whole = {name: tensor for name, tensor in state.items() if not name.endswith(("attn.q_bias", "attn.v_bias"))}
    stems = sorted({name[: -len("q_bias")] for name in state.keys() - whole.keys()})
    for stem in stems:
        query, value = state.get(f"{stem}q_bias"), state.get(f"{stem}v_bias")
        if query is None or value is None:
            lacking = "q_bias" if query is None else "v_bias"
            raise CheckpointError(f"{path} lacks {stem}{lacking}", "copy or download it again")
        whole[f"{stem}qkv_bias"] = torch.cat([query, torch.zeros_like(query), value])
    return whole
