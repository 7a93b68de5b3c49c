"""Options without effect give a warning, as in transformers, with the flag's name on the command line."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from blip2edge.cli import main
from blip2edge.cli.messages import flag
from blip2edge.errors import WithoutEffectWarning
from blip2edge.runtime.decoding.options import GenerationOptions, merged
from blip2edge.runtime.decoding.sampling import warn_of_unused
from blip2edge.training.data.scenes import make_scene

SEED = "--seed has no effect: only sampling uses it; give a --temperature above 0, or leave it out"


def warned(given: dict[str, Any], **defaults: Any) -> list[str]:
    """The flags that are warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unused(GenerationOptions(**merged(defaults, given)), given)
    texts = [each.message.text(flag) for each in caught if isinstance(each.message, WithoutEffectWarning)]
    assert len(texts) == len(caught)
    return [text.partition(" has no effect: ")[0] for text in texts]


@pytest.mark.parametrize(
    ("given", "defaults", "flags"),
    [
        ({"length_penalty": 2.0}, {}, ["--length-penalty"]),
        ({"length_penalty": 2.0}, {"num_beams": 5}, []),  # BLIP-2's own default
        ({"length_penalty": 2.0, "num_beams": 1}, {"num_beams": 5}, ["--length-penalty"]),
        ({"length_penalty": 1.0}, {}, []),  # the default changes nothing in beam search either
        ({"early_stopping": True}, {}, ["--early-stopping"]),
        ({"seed": 0}, {}, ["--seed"]),
        ({"seed": 3, "num_beams": 4}, {}, ["--seed"]),
        ({"seed": 3, "temperature": 0.0, "top_p": 0.9}, {}, ["--seed", "--top-p"]),
        ({"temperature": 0.0, "min_p": 0.1, "typical_p": 0.5}, {}, ["--min-p", "--typical-p"]),
        ({"temperature": 0.0, "top_p": 1.0, "top_k": 0, "eta_cutoff": 0.0}, {}, []),  # they change nothing anyway
        ({"seed": 3}, {"temperature": 0.7}, []),
        ({"seed": 3, "top_k": 5}, {}, []),
        ({}, {"length_penalty": 2.0, "temperature": 0.0, "top_p": 0.9}, []),  # of the bundle, not of the caller
        ({"max_new_tokens": 4, "repetition_penalty": 1.2}, {}, []),
    ],
)
def test_the_options_that_are_warned_of(given: dict[str, Any], defaults: dict[str, Any], flags: list[str]) -> None:
    assert warned(given, **defaults) == flags


@pytest.fixture(name="picture")
def _picture(tmp_path: Path) -> Path:
    path = tmp_path / "pictures" / "scene.png"
    path.parent.mkdir()
    make_scene(0, seed=0).picture.save(path)
    path.with_suffix(".txt").write_text("a red circle")
    return path


def test_every_command_warns(picture: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, folder = str(tiny_bundle), str(picture.parent)
    for words in (
        ["caption", str(picture), "-b", bundle, "--seed", "3"],
        ["caption", str(picture), "-b", bundle, "--stream", "--seed", "3"],
        ["watch", folder, "--once", "-b", bundle, "--seed", "3"],
        ["bulk", folder, "-o", str(tmp_path / "out.parquet"), "-b", bundle, "--seed", "3"],
        ["eval", bundle, "--data", folder, "--length-penalty", "2", "--num-beams", "1", "--metrics", "captions"],
    ):
        with pytest.warns(WithoutEffectWarning, match="has no effect: only"):
            assert main(words) == 0, words


def test_the_process_prints_a_line(picture: Path, tiny_bundle: Path) -> None:
    words = ["-m", "blip2edge", "caption", str(picture), "-b", str(tiny_bundle), "--max-new-tokens", "3"]
    plain, seeded = (
        subprocess.run([sys.executable, *words, *more], capture_output=True, text=True, check=True, timeout=120)
        for more in ([], ["--seed", "3"])
    )
    assert f"warning: {SEED}" in seeded.stderr.splitlines()
    assert "has no effect" not in plain.stderr
    assert seeded.stdout == plain.stdout
