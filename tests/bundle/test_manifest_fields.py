"""The fields of ``bundle.json``: values outside their range, and sizes that do not fit the graphs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip2edge.bundle.manifest import MANIFEST, Manifest, read_manifest
from blip2edge.bundle.schema import Axis
from blip2edge.errors import BundleError

HASH = {"sha256": "0" * 64, "size": 5}


def tensor(name: str, *dims: int | str, dtype: str = "float32") -> dict[str, Any]:
    axes = [{"size": dim} if isinstance(dim, int) else {"name": dim, "min": 1, "opt": 1, "max": 8} for dim in dims]
    return {"name": name, "dtype": dtype, "axes": axes}


def graph(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"precision": "fp32", "inputs": inputs, "outputs": outputs}


def document() -> dict[str, Any]:
    """A small manifest with a vision encoder, a bridge and a decoder of one layer."""
    caches = ["past_key_values.0.key", "past_key_values.0.value"]
    return {
        "schema_version": 1,
        "family": "blip-2",
        "source": {"checkpoint": "x", "sha256": "0" * 64},
        "precision": "fp32",
        "verify": "full",
        "graphs": {
            "vision_encoder": graph(
                [tensor("pixel_values", "batch", 3, 32, 32)], [tensor("image_embeds", "batch", 17, 8)]
            ),
            "bridge": graph([tensor("image_embeds", "batch", 17, 8)], [tensor("visual_tokens", "batch", 5, 8)]),
            "decoder": graph(
                [
                    tensor("inputs_embeds", "batch", "steps", 8),
                    *(tensor(name, "batch", 2, "past", 4) for name in caches),
                ],
                [tensor("logits", "batch", "asked", 120)]
                + [tensor(f"present.0.{kind}", "batch", 2, "past + steps", 4) for kind in ("key", "value")],
            ),
        },
        "cache": {"num_layers": 1, "num_heads": 2, "head_dim": 4},
        "max_positions": 64,
        "vocab_size": 120,
        "preprocessing": {"resize": True, "size": {"height": 32, "width": 32}, "mean": [0.5, 0.5, 0.5]},
        "prompt": {"template": "{image}{prompt}", "question": "", "visual_tokens": 5, "bos_token_id": 2, "frames": 1},
        "generation": {"eos_token_ids": [2], "max_new_tokens": 30},
        "files": dict.fromkeys(("vision_encoder.onnx", "bridge.onnx", "decoder.onnx"), HASH),
        "versions": {"blip2edge": "0"},
    }


def read(values: Any, folder: Path) -> Manifest:
    (folder / MANIFEST).write_text(json.dumps(values))
    return read_manifest(folder)


def test_a_manifest_within_all_ranges(tmp_path: Path) -> None:
    found = read(document(), tmp_path)
    assert (found.vocab_size, found.max_positions) == (120, 64)
    again = read(found.to_json(), tmp_path)
    assert again == found


@pytest.mark.parametrize("resample", range(6))
def test_every_filter_of_pillow(resample: int, tmp_path: Path) -> None:
    values = document()
    values["preprocessing"]["resample"] = resample
    assert read(values, tmp_path).preprocessing["resample"] == resample


Change = Callable[[dict[str, Any]], Any]
RANGES: dict[str, tuple[Change, str]] = {
    "negative tokens": (
        lambda v: v["prompt"].update(visual_tokens=-5),
        "prompt.visual_tokens: expected a whole number",
    ),
    "10^12 positions": (lambda v: v.update(max_positions=10**12), "max_positions: expected a whole number from 1 to"),
    "no position": (lambda v: v.update(max_positions=0), "max_positions: expected a whole number from 1 to"),
    "a float": (lambda v: v.update(max_positions=64.0), "max_positions: expected a whole number"),
    "true": (lambda v: v.update(vocab_size=True), r"vocab_size: expected a whole number .* got True"),
    "no vocabulary": (lambda v: v.update(vocab_size=0), "vocab_size: expected a whole number"),
    "infinite": (lambda v: v["preprocessing"].update(mean=[0.5, 1e999, 0.5]), "expected a (finite )?number"),
    "two channels": (lambda v: v["preprocessing"].update(mean=[0.5, 0.5]), "preprocessing.mean: expected a list of 3"),
    "four channels": (lambda v: v["preprocessing"].update(std=[0.5] * 4), "preprocessing.std: expected a list of 3"),
    "a filter": (lambda v: v["preprocessing"].update(resample=6), "preprocessing.resample: expected a whole number"),
    "a token of placeholders": (
        lambda v: v["prompt"].update(kind="segments", image_token="<image>"),
        "a prompt of kind segments must not have the token for a picture of kind placeholder",
    ),
    "no token of placeholders": (
        lambda v: v["prompt"].update(kind="placeholder"),
        "a prompt of kind placeholder needs the token for a picture of kind placeholder",
    ),
    "a huge picture": (
        lambda v: v["preprocessing"].update(size={"height": 10**6, "width": 1}),
        r"preprocessing.size.height: expected a whole number from 1 to 65535, got 1000000",
    ),
    "an unknown step": (lambda v: v["preprocessing"].update(blur=1), "preprocessing.'blur' is no known key"),
    "a path": (lambda v: v["files"].update({"../x": HASH}), "a key of files: expected the name of a file"),
    "a NUL": (lambda v: v["prompt"].update(template="\0"), "prompt.template: expected a text"),
    "a hash": (lambda v: v["files"].update({"x": {**HASH, "sha256": "0"}}), "files.x.sha256: expected a SHA-256"),
    "a size": (lambda v: v["files"].update({"x": {**HASH, "size": -1}}), "files.x.size: expected a whole number"),
    "no tensors": (lambda v: v["graphs"]["bridge"].update(inputs=[]), "graphs.bridge.inputs: expected a list of 1"),
    "a rank": (
        lambda v: v["graphs"]["bridge"]["inputs"].append(tensor("x", *[1] * 9)),
        r"graphs.bridge.inputs\[1\].axes: expected a list of 0 to 8",
    ),
    "an empty axis": (
        lambda v: v["graphs"]["bridge"]["inputs"][0]["axes"].append({"size": 0}),
        r"axes\[3\].size: expected a whole number from 1",
    ),
    "a list in place of an axis": (
        lambda v: v["graphs"]["bridge"]["inputs"][0]["axes"].append(["size"]),
        r"axes\[3\]: expected an object",
    ),
    "an order": (
        lambda v: v["graphs"]["bridge"]["inputs"][0]["axes"][0].update(min=2, max=1),
        "does not hold",
    ),
    "a graph's name": (lambda v: v["graphs"].update({"../x": v["graphs"]["bridge"]}), "a key of graphs: expected"),
    "frames": (lambda v: v["prompt"].update(frames=0), "prompt.frames: expected a whole number"),
    "tokens of the end": (lambda v: v["generation"].update(eos_token_ids=[2.5]), r"eos_token_ids\[0\]: expected"),
    "layers": (lambda v: v["cache"].update(num_layers=10**9), "cache.num_layers: expected a whole number"),
    "an engine's bundle": (lambda v: v.update(engines_of="abc"), "engines_of: expected a SHA-256"),
    "a calibration": (lambda v: v.update(calibration={"method": "minmax"}), "calibration.pictures is missing"),
}
CLOSED: dict[str, dict[str, Any]] = {
    "cross": {"num_layers": 1, "num_heads": 2, "head_dim": 4, "source_dim": 8},
    "draft": {"num_layers": 1, "num_heads": 2, "head_dim": 4, "dec_token_id": 1, "end_token_id": 2, "max_positions": 9},
    "merging": {"merge_tokens": 4, "embeds": 17, "embeds_before": 21},
    "tokenizer": {"split_special_tokens": True},
}
"""Objects whose keys are all known."""

FITS: dict[str, tuple[Change, str]] = {
    "no graph": (lambda v: v.update(graphs={}), "graphs: expected at least one graph"),
    "double inputs": (
        lambda v: v["graphs"]["bridge"].update(inputs=2 * v["graphs"]["bridge"]["inputs"]),
        "graphs.bridge: two inputs have one name",
    ),
    "logits": (lambda v: v.update(vocab_size=119), "vocab_size: expected the width of the decoder's output logits"),
    "heads": (lambda v: v["cache"].update(num_heads=3), "cache: expected past_key_values.0.key of 3 heads"),
    "width": (lambda v: v["cache"].update(head_dim=5), "cache: expected past_key_values.0.key of 2 heads of width 5"),
    "layers": (lambda v: v["cache"].update(num_layers=2), "cache: expected 4 inputs"),
    "outputs": (lambda v: v["graphs"]["decoder"]["outputs"].pop(), "cache: expected present.0.value"),
    "fewer layers": (
        lambda v: v["graphs"]["decoder"]["inputs"].append(tensor("past_key_values.1.key", "batch", 2, "past", 4)),
        r"cache: expected 2 inputs past_key_values\.\* of the decoder for 1 layers, got 3",
    ),
    "no embeddings": (lambda v: v["graphs"]["decoder"]["inputs"].pop(0), "expected an input inputs_embeds"),
    "integers": (
        lambda v: v["graphs"]["vision_encoder"]["inputs"][0].update(dtype="int64"),
        "graphs.vision_encoder: expected an input pixel_values in floating point",
    ),
    "no cache": (lambda v: v.update(cache=None), "cache: expected the sizes of the decoder's KV cache, got null"),
    "pixels": (
        lambda v: v["preprocessing"].update(size={"height": 32, "width": 31}),
        r"preprocessing: pictures of \(32, 31\) pixels do not fit pixel_values of \(32, 32\)",
    ),
    "a crop": (
        lambda v: v["preprocessing"].update(size={"shortest_edge": 40}, crop={"height": 24, "width": 32}),
        r"pictures of \(24, 32\) pixels",
    ),
    "visual tokens": (
        lambda v: v["prompt"].update(visual_tokens=6),
        "prompt.visual_tokens: expected 5, as the bridge has 5 for each of 1 pictures, got 6",
    ),
    "frames": (lambda v: v["prompt"].update(frames=2), "prompt.visual_tokens: expected 10"),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_value_outside_its_range(name: str, tmp_path: Path) -> None:
    change, told = RANGES[name]
    values = document()
    change(values)
    with pytest.raises(BundleError, match=told) as caught:
        read(values, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CLOSED)
def test_an_unknown_key_of_a_known_object(name: str, tmp_path: Path) -> None:
    read({**document(), name: CLOSED[name]}, tmp_path)
    with pytest.raises(BundleError, match=rf"{name}.*'blur' is no known key"):
        read({**document(), name: {**CLOSED[name], "blur": 1}}, tmp_path)


@pytest.mark.parametrize("name", FITS)
def test_sizes_that_do_not_fit_the_graphs(name: str, tmp_path: Path) -> None:
    change, told = FITS[name]
    values = document()
    change(values)
    with pytest.raises(BundleError, match=told):
        read(values, tmp_path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value of a document."""
    found = [path] if path else []
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(each, (*path, key))
    return found


PLACES = places(document())


@pytest.mark.parametrize("value", [None, True, -5, 1.5, 10**12, "", "a/b\0", [], {}, [[]], {"a": None}])
def test_every_value_replaced_is_refused_or_read_again_as_it_was(value: Any) -> None:
    """No value raises anything else, and what is accepted is kept."""
    for path in PLACES:
        values = copy.deepcopy(document())
        holder = values
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        try:
            found = Manifest.from_json(values)
        except ValueError:
            continue
        assert Manifest.from_json(found.to_json()) == found, path


def test_the_sum_of_two_axes_has_the_sum_of_their_ranges() -> None:
    whole = Axis("past", 1, 3, 9) + Axis("steps", 2, 4, 5)
    assert whole == Axis("past + steps", 3, 7, 14)
    assert whole.value({"past": 4, "steps": 2}) == 6
