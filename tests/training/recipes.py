"""A recipe so small that a whole run takes a second."""

from __future__ import annotations

from pathlib import Path

SIZES = "hidden_size = 32\nintermediate_size = 64\nnum_layers = 1\nnum_heads = 2\n"
STEPS = 4
PHASE = f"steps = {STEPS}\nbatch_size = 2\nwarmup_steps = 1\n"
PHASES = ("vision", "language", "stage1", "stage2")


def recipe(top: str = "seed = 1", **sections: str) -> str:
    """A recipe as TOML.

    Args:
        top: Lines above the first section.
        **sections: Further lines of a section, by its name.
    """
    parts = {f"model.{part}": SIZES for part in ("vision", "qformer", "language")}
    parts |= dict.fromkeys(PHASES, PHASE)
    parts["stage1"] += "embed_dim = 16\n"
    parts["model.qformer"] = SIZES.replace("num_layers = 1", "num_layers = 2")
    for name, lines in sections.items():
        parts[name] = parts.get(name, "") + lines + "\n"
    return f"{top}\n" + "".join(f"[{name}]\n{lines}" for name, lines in parts.items())


def write(path: Path, top: str = "seed = 1", **sections: str) -> Path:
    """The same, written to a file."""
    path.write_text(recipe(top, **sections))
    return path
