"""A recipe so small that a whole run takes a second."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

SIZES = "hidden_size = 32\nintermediate_size = 64\nnum_layers = 1\nnum_heads = 2\n"
STEPS = 4
PHASE = f"steps = {STEPS}\nbatch_size = 2\nwarmup_steps = 1\n"
PHASES = ("vision", "language", "stage1", "stage2")


def recipe(top: str = "seed = 1", **sections: str) -> str:
    """A recipe as TOML; of the miniature, unless `model` names trained parts.

    Args:
        top: Lines above the first section.
        **sections: Further lines of a section, by its name.
    """
    named = any(key in sections.get("model", "") for key in ("checkpoint", "vision_from"))
    miniature = () if named else ("vision", "language")  # only the miniature is pretrained, and has these sizes
    parts = {f"model.{part}": SIZES for part in miniature}
    parts |= dict.fromkeys([*miniature, "stage1", "stage2"], PHASE)
    parts["stage1"] += "embed_dim = 16\n"
    if not named:
        parts["model.qformer"] = SIZES.replace("num_layers = 1", "num_layers = 2")
    for name, lines in sections.items():
        parts[name] = parts.get(name, "") + lines + "\n"
    return f"{top}\n" + "".join(f"[{name}]\n{lines}" for name, lines in parts.items())


def write(path: Path, top: str = "seed = 1", **sections: str) -> Path:
    """The same, written to a file."""
    path.write_text(recipe(top, **sections))
    return path


def tensor_hashes(module: nn.Module) -> dict[str, str]:
    """A SHA-256 of every tensor of a part: what "frozen" can be checked with.

    Args:
        module: Any.

    Returns:
        From names to hexadecimal digests of the raw bytes.
    """
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in module.state_dict().items()
    }
