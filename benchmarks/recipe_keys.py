"""Writes the tables of recipe keys in docs/training.md, from the dataclasses that read a recipe.

python benchmarks/recipe_keys.py --write docs/training.md
python benchmarks/recipe_keys.py --check docs/training.md
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

from blip2edge.cli import run_script
from blip2edge.training import config as recipes
from blip2edge.training.data.config import DataConfig

BEGIN, END = "<!-- keys: made by benchmarks/recipe_keys.py -->\n", "<!-- end of keys -->\n"
PHASES = ("vision", "language", "stage1", "stage2", "instruct")
BLOCKS = ("vision", "qformer", "language")


def meanings(kind: type) -> dict[str, str]:
    """Returns the docstring of each field of a dataclass, inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[name] = " ".join(said.split())
    return found


def written(value: Any) -> str:
    """Returns a default value in TOML's notation."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in value) + "]`"
    return f"`{value}`"


def table(kind: type, without: type | None = None) -> str:
    """Returns a table with one row for each key of a section.

    Keys that the section ``without`` also has, with the same default, are left out.
    """
    default, plain = kind(), None if without is None else without()
    texts = meanings(kind)
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value) or field.name == "sets":  # written as [[data]]
            continue
        if plain is not None and hasattr(plain, field.name) and getattr(plain, field.name) == value:
            continue
        rows.append(f"| `{field.name}` | {written(value)} | {texts[field.name]} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def document() -> str:
    """Returns the tables of all recipe keys as Markdown."""
    types = {
        field.name: type(getattr(recipes.TrainingConfig(), field.name))
        for field in dataclasses.fields(recipes.TrainingConfig)
    }
    parts = ["At the top of the file:\n", table(recipes.TrainingConfig)]
    for name in ("data", "model"):
        parts += [f"`[{name}]`: {summary(types[name])}\n", table(types[name])]
    blocks = ", ".join(f"`[model.{name}]`" for name in BLOCKS)
    parts += [f"{blocks}:\n", table(recipes.BlockSizes)]
    parts += [f"`[loop]`: {summary(types['loop'])}\n", table(types["loop"])]
    own = table(types["validation"], DataConfig)
    parts += [f"`[validation]`: {summary(types['validation'])} Its keys are those of `[data]` and these:\n", own]
    names = ", ".join(f"`[{name}]`" for name in PHASES)
    parts += [f"Each of {names}:\n", table(recipes.OptimizerConfig)]
    for name in PHASES:
        base = recipes.Stage2Phase if name == "instruct" else recipes.OptimizerConfig
        rows = table(types[name], base)
        more = "these:" if rows else "those of `[stage2]`."
        parts += [
            f"`[{name}]`: {summary(types[name])} Its keys are those above and {more}\n",
            *([rows] if rows else []),
        ]
    return "\n".join(parts)


def summary(kind: type) -> str:
    """Returns the first sentence of a section's description."""
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def placed(page: str) -> str:
    """Returns the page with new tables between the marks BEGIN and END."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{document()}\n{END}{after}"


def main() -> None:
    """Writes the tables of recipe keys into docs/training.md, or compares them with the tables in that file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--write", type=Path, metavar="FILE", help="write the tables into the page FILE")
    how.add_argument("--check", type=Path, metavar="FILE", help="exit 1 unless the tables in FILE are up to date")
    options = parser.parse_args()
    path: Path = options.write or options.check
    page = path.read_text(encoding="utf-8")
    if options.write:
        path.write_text(placed(page), encoding="utf-8")
    elif placed(page) != page:
        sys.exit(f"{path} does not have the current keys of recipes; run: make docs")


if __name__ == "__main__":
    run_script(main)
