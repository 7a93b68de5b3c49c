"""Draws a key of a side file and a value for it, and compares transformers' answers with those of the export.

    python -m tests.side_file_draws --draws 1000 --seed 1

Each draw changes one key of one file next to the weights of a tiny checkpoint. The result is one of:

- ``equal``: exported, and the answers are those of transformers for the changed file;
- ``refused``: the export refuses the file (``unneeded`` if transformers' answers do not change);
- ``fails``: transformers cannot load or run the changed checkpoint, the export does not refuse it;
- ``tie``: exported, and the first id that differs is one of two candidates with nearly the same score;
- ``different``: exported, and the answers differ, or an error that is not meant for users. There must be none.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import Blip2EdgeError, PromptError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.export.side_files import SideFiles
from blip2edge.model.checkpoint.directory import Checkpoint
from tests.side_file_kinds import KINDS, Answers, Kind, ours, theirs, tied
from tests.side_file_values import change


def same(one: Answers, other: Answers) -> bool:
    """Whether ids are equal, and scores are to 1e-4."""
    for a, b in zip(one, other, strict=True):
        if all(isinstance(value, int) for value in [*a, *b]):
            if a != b:
                return False
        elif len(a) != len(b) or max(abs(x - y) for x, y in zip(a, b, strict=True)) > 1e-4:
            return False
    return True


@dataclass
class Base:
    """An unchanged checkpoint, its bundle, and the answers of both."""

    kind: Kind
    directory: Path
    bundle: Path
    answers: Answers
    state: tuple[Any, SideFiles, Any]


@dataclass
class Draws:
    """The draws of a run.

    Attributes:
        root: Directory for checkpoints.
        seed: Of the draws.
        kinds: Keys of :data:`KINDS`.
    """

    root: Path
    seed: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)
    bases: dict[str, Base] = field(default_factory=dict)

    def base(self, name: str) -> Base:
        """The checkpoint of a kind; drawn and exported once."""
        if name not in self.bases:
            directory = self.root / name.replace(", ", "-")
            kind = KINDS[name]
            bundle = directory / "bundle"
            if not bundle.is_dir():
                kind.save(directory / "checkpoint")
                export_checkpoint(directory / "checkpoint", bundle, verify="sample")
            answers, state = theirs(directory / "checkpoint", kind), state_of(directory / "checkpoint")
            assert same(ours(bundle, kind), answers), name
            assert name == "pool" or not state[1].warnings, state[1].warnings
            self.bases[name] = Base(kind, directory / "checkpoint", bundle, answers, state)
        return self.bases[name]

    def run(self, count: int) -> Iterator[tuple[str, str]]:
        """Makes draws; each result with a description of the draw."""
        rng = random.Random(self.seed)
        for _ in range(count):
            name = rng.choice(self.kinds)
            base = self.base(name)
            with tempfile.TemporaryDirectory(dir=self.root) as folder:
                directory = Path(folder) / "checkpoint"
                shutil.copytree(base.directory, directory)
                file, section, key, value = change(directory, rng)
                told = f"{name}: {file} {section}{key} = {json.dumps(value)}"
                yield judge(base, directory, must_name(key)), told


def state_of(directory: Path) -> tuple[Any, SideFiles, Any]:
    """All that the export takes from the files."""
    checkpoint = Checkpoint(directory)
    side = SideFiles.read(directory, checkpoint.config)
    sources = {name: checkpoint.map.sources(name) for name in checkpoint.shapes}
    checkpoint.files.close()
    return checkpoint.config, side, sources


def must_name(key: str) -> str:
    """A text that a warning must hold where the change does not change the export."""
    if key == "chat_template":
        return "chat template"
    return key if key.startswith("favourite") else ""


def judge(base: Base, directory: Path, named: str) -> str:
    """The result of a changed checkpoint.

    Args:
        base: The unchanged checkpoint.
        directory: The changed one.
        named: A text that a warning must hold where the change does not change the export.
    """
    try:
        wanted: Answers | None = theirs(directory, base.kind)
    except Exception:  # noqa: BLE001 - transformers raises all kinds
        wanted = None
    try:
        state = state_of(directory)
    except Blip2EdgeError as error:
        changed = wanted is None or not same(wanted, base.answers)
        return f"refused{'' if changed else ', unneeded'}: {error}"
    except Exception as error:  # noqa: BLE001 - a fault of the export
        return f"different: {type(error).__name__}: {error}"
    side = state[1]
    if named and side.prompt == base.state[1].prompt and not any(named in warning for warning in side.warnings):
        return f"different: no warning names the {named}"
    if wanted is None:
        return "fails"
    unchanged = dataclasses.replace(base.state[1], warnings=side.warnings)
    if state == (base.state[0], unchanged, base.state[2]):
        found = base.answers
    else:
        bundle = directory.parent / "bundle"
        if state[0] == base.state[0] and state[2] == base.state[2]:
            copy_bundle(base.bundle, bundle, state[1])
        else:
            export_checkpoint(directory, bundle, verify="sample")
        try:
            found = ours(bundle, base.kind)
        except PromptError as error:  # the text of the request has become a special token
            return f"refused at run: {error}"
        except Blip2EdgeError as error:
            return f"different: {error}"
    if same(found, wanted):
        return "equal" if same(wanted, base.answers) else "equal, changed"
    told = f"{found} instead of {wanted}, before {base.answers}"
    return f"{'tie' if ties(base.kind, directory, found, wanted) else 'different'}: {told}"


def ties(kind: Kind, directory: Path, found: Answers, wanted: Answers) -> bool:
    """Whether all differences are ties; see :func:`tests.side_file_kinds.tied`. Scores of a matcher have none."""
    pairs = zip(found, wanted, strict=True)
    unlike = [(at, ids) for at, (ids, other) in enumerate(pairs) if not same([ids], [other])]
    whole = all(isinstance(value, int) for ids in (*found, *wanted) for value in ids)
    return whole and all(tied(directory, kind, at, ids) for at, ids in unlike)


def copy_bundle(source: Path, target: Path, side: SideFiles) -> None:
    """A bundle with other side files and the same graphs."""
    shutil.copytree(source, target)
    side.write(target)
    manifest = Bundle.open(source).manifest
    files = {name: FileRecord.of(target / name) for name in manifest.files}
    dataclasses.replace(
        manifest,
        preprocessing=side.preprocessing.to_json(),
        prompt=side.prompt,
        generation=side.generation,
        tokenizer=side.tokenizer_flags,
        files=files,
    ).write(target)


def main() -> None:
    """Prints each draw and the number of each result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--root", type=Path, help="keeps the unchanged checkpoints and bundles for another run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    if options.root is not None:
        options.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for result, told in Draws(options.root or Path(folder), options.seed, tuple(options.kinds)).run(options.draws):
            counts[result.split(":")[0]] += 1
            print(f"{told} -> {result}", flush=True)
    print(dict(counts))
    raise SystemExit(counts["different"] > 0)


if __name__ == "__main__":
    main()
