"""Checkpoints: reading and writing are compatible with transformers; errors name the wrong part."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="model/ needs torch")
pytest.importorskip("transformers", reason="transformers is the oracle")

from transformers import Blip2ForConditionalGeneration  # noqa: E402

from blip2edge.errors import CheckpointError, UnsupportedModelError  # noqa: E402
from blip2edge.model.checkpoint.directory import Checkpoint, load_checkpoint, save_checkpoint  # noqa: E402
from tests.drawing import BOS, IMAGE, PAD, Drawn, Variant, draw_model, rewrite_tensors, save  # noqa: E402

RELATIVE = 1e-5  # of the largest logit; seen: 2e-6
VARIANTS = {
    "plain": Variant(seed=1),
    "untied": Variant(seed=2, tied=False),
    "norm after": Variant(seed=3, norm_before=False),
    "narrow table": Variant(seed=4, embed_dim=16),
    "350m: narrow table, norm after": Variant(seed=5, embed_dim=16, norm_before=False),
    "narrow table, untied": Variant(seed=6, embed_dim=20, tied=False),
    "no qkv bias": Variant(seed=7, qkv_bias=False),
    "gelu, several ends": Variant(seed=8, activation="gelu", eos=(2, 9)),
    "odd sizes": Variant(
        seed=9, image_size=30, patch_size=7, vision_width=24, vision_heads=3, queries=7, qformer_layers=4,
        cross_frequency=3, qformer_width=20, qformer_heads=5, width=48, heads=6, layers=3,
    ),
}  # fmt: skip


def tokens(variant: Variant, rows: int) -> Any:
    """input_ids of transformers: slots, BOS, three words."""
    return torch.tensor([[IMAGE] * variant.queries + [BOS, 7, 8 + row, 9] for row in range(rows)])


@torch.no_grad()
def logits_of_transformers(model: Any, pixels: Any, ids: Any, queries: int) -> Any:
    """Logits behind the text; picture by picture where the table is narrow (see model/bridges/qformer.py)."""
    rows = [model(pixel_values=pixels[i : i + 1], input_ids=ids[i : i + 1]).logits for i in range(len(ids))]
    return torch.cat(rows)[:, queries:]


@torch.no_grad()
def logits_of_ours(directory: Path, pixels: Any, ids: Any, queries: int) -> Any:
    model = load_checkpoint(directory)
    return model(model.visual_tokens(pixels), ids[:, queries:])


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_and_come_back_from_what_we_save(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    theirs = draw_model(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    pixels = torch.randn(2, 3, variant.image_size, variant.image_size)
    ids = tokens(variant, 2)
    wanted = logits_of_transformers(theirs, pixels, ids, variant.queries)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1, "the picture must matter"
    bound = RELATIVE * wanted.abs().max()
    assert (logits_of_ours(tmp_path / "theirs", pixels, ids, variant.queries) - wanted).abs().max() <= bound

    save_checkpoint(load_checkpoint(tmp_path / "theirs"), tmp_path / "ours")
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits_of_transformers(again, pixels, ids, variant.queries), wanted)
    options = {"pixel_values": pixels[:1], "input_ids": ids[:1], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(**options), theirs.generate(**options))
    assert (logits_of_ours(tmp_path / "ours", pixels, ids, variant.queries) - wanted).abs().max() <= bound


def test_a_batch_of_a_narrow_table_is_what_each_picture_gives(tmp_path: Path) -> None:
    variant = VARIANTS["narrow table"]
    draw_model(variant).save_pretrained(tmp_path)
    pixels, ids = torch.randn(3, 3, 32, 32), tokens(variant, 3)
    batch = logits_of_ours(tmp_path, pixels, ids, variant.queries)
    rows = [logits_of_ours(tmp_path, pixels[i : i + 1], ids[i : i + 1], variant.queries) for i in range(3)]
    assert torch.allclose(batch, torch.cat(rows), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_safetensors(tied: bool, tmp_path: Path) -> None:
    variant = Variant(seed=11, tied=tied)
    theirs = draw_model(variant)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    pixels, ids = torch.randn(1, 3, 32, 32), tokens(variant, 1)
    wanted = logits_of_transformers(theirs, pixels, ids, variant.queries)
    got = logits_of_ours(tmp_path, pixels, ids, variant.queries)
    assert (got - wanted).abs().max() <= RELATIVE * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_written(dtype: Any, tmp_path: Path) -> None:
    variant = Variant(seed=12)
    draw_model(variant).to(dtype).save_pretrained(tmp_path / "theirs")
    model = load_checkpoint(tmp_path / "theirs")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    save_checkpoint(model, tmp_path / "ours", dtype=dtype)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    again = load_checkpoint(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_side_files_come_along(tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(tiny_checkpoint.directory), tmp_path, like=tiny_checkpoint.directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tiny_checkpoint.directory / name).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_counts_once(tied: bool, tmp_path: Path) -> None:
    """As in the memory of the model, where the head is the token table."""
    draw_model(Variant(seed=14, tied=tied)).save_pretrained(tmp_path)
    with_head = sum(math.prod(shape) for shape in Checkpoint(tmp_path).shapes.values())
    own = sum(math.prod(shape) for shape in Checkpoint(tmp_path).own_shapes().values())
    model = load_checkpoint(tmp_path)
    assert own == sum({one.data_ptr(): one.numel() for one in model.parameters()}.values())  # shared memory once
    assert with_head - own == (model.state_dict()["language.head.weight"].numel() if tied else 0)


def test_a_head_that_repeats_the_table_may_stand_in_a_tied_checkpoint(tmp_path: Path) -> None:
    variant = Variant(seed=13)
    theirs = draw_model(variant)
    theirs.save_pretrained(tmp_path)
    table = "language_model.model.decoder.embed_tokens.weight"
    rewrite_tensors(tmp_path, lambda t: t.update({"language_model.lm_head.weight": t[table].clone()}))
    pixels, ids = torch.randn(1, 3, 32, 32), tokens(variant, 1)
    wanted = logits_of_transformers(theirs, pixels, ids, variant.queries)
    got = logits_of_ours(tmp_path, pixels, ids, variant.queries)
    assert (got - wanted).abs().max() <= RELATIVE * wanted.abs().max()


def test_special_ids_are_read(tmp_path: Path) -> None:
    variant = Variant(eos=(5, 9))
    draw_model(variant).save_pretrained(tmp_path)
    config: Any = Checkpoint(tmp_path).config
    found = (config.bos_token_id, config.eos_token_ids, config.pad_token_id, config.image_token_id)
    assert found == (BOS, (5, 9), PAD, IMAGE)


@pytest.fixture
def broken(tiny_checkpoint: Drawn, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint.directory, tmp_path / "broken"))


FC1 = "language_model.model.decoder.layers.1.fc1.weight"
QUERY = "qformer.encoder.layer.0.crossattention.attention.query.bias"


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop(FC1), (FC1, "lacks")),
        (drop(QUERY, FC1), (QUERY, FC1)),
        (lambda t: t.update({"language_model.model.decoder.layers.2.fc1.bias": torch.ones(3)}), ("layers.2.fc1.bias",)),
        (lambda t: t.update({"vision_model.extra": torch.ones(1)}), ("vision_model.extra", "does not describe")),
        (lambda t: t.update({FC1: t[FC1][:-1]}), (FC1, "[63, 32]", "[64, 32]")),
        (lambda t: t.update({"query_tokens": t["query_tokens"][0]}), ("query_tokens", "[5, 24]")),
        (lambda t: t.update({FC1: torch.tensor(1.0)}), (FC1, "[]")),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(change: Any, told: tuple[str, ...], broken: Path) -> None:
    rewrite_tensors(broken, change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(broken)
    for part in told:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def set_config(directory: Path, section: str | None, **values: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    (config if section is None else config[section]).update(values)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("text_config", {"hidden_size": 30}, "30"),
        ("text_config", {"hidden_size": "32"}, "text_config.hidden_size"),
        ("text_config", {"num_attention_heads": 0}, "text_config.num_attention_heads"),
        ("text_config", {"num_hidden_layers": 3}, "layers.2"),
        ("text_config", {"num_hidden_layers": 1}, "layers.1"),
        ("text_config", {"activation_function": "mish"}, "mish"),
        ("text_config", {"do_layer_norm_before": "yes"}, "do_layer_norm_before"),
        ("text_config", {"eos_token_id": "</s>"}, "eos_token_id"),
        ("vision_config", {"patch_size": 64}, "64"),
        ("vision_config", {"image_size": -32}, "vision_config.image_size"),
        ("vision_config", {"layer_norm_eps": float("nan")}, "vision_config.layer_norm_eps"),
        ("qformer_config", {"num_attention_heads": 5}, "number of heads 5"),
        ("qformer_config", {"cross_attention_frequency": 0}, "cross_attention_frequency"),
        (None, {"vision_config": [1]}, "vision_config"),
        (None, {"num_query_tokens": True}, "num_query_tokens"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(section: str | None, values: dict[str, Any], told: str, broken: Path) -> None:
    set_config(broken, section, **values)
    with pytest.raises(CheckpointError, match=r".") as caught:
        load_checkpoint(broken)
    assert told in str(caught.value)


@pytest.mark.parametrize("model_type", ["kosmos-2", None, 3, ["blip-2"]])
def test_an_unsupported_model_type_lists_the_supported(model_type: Any, broken: Path) -> None:
    set_config(broken, None, model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=r"supported: .*blip-2.*opt"):
        load_checkpoint(broken)


@pytest.mark.parametrize("model_type", ["bloom", None, {}])
def test_an_unsupported_language_model_lists_the_supported(model_type: Any, broken: Path) -> None:
    set_config(broken, "text_config", model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=r"supported: .*opt"):
        load_checkpoint(broken)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b'{"model_type": '])
def test_config_missing_or_broken(content: bytes | None, broken: Path) -> None:
    (broken / "config.json").unlink()
    if content is not None:
        (broken / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(broken)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_safetensors(kept: int, broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as a whole safetensors file"):
        load_checkpoint(broken)


def test_missing_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_checkpoint(broken)
    (broken / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        load_checkpoint(broken)


def test_missing_shard(tmp_path: Path) -> None:
    draw_model(Variant()).save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_broken_index(index: str, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_checkpoint(broken)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "/nowhere/at/all"])
def test_no_such_checkpoint(name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        load_checkpoint(name)


def test_a_hub_name_without_a_network() -> None:
    with pytest.raises(CheckpointError, match="could not be fetched"):
        load_checkpoint("blip2edge-tests/no-such-model")


def test_a_file_is_no_checkpoint(tiny_checkpoint: Drawn) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        load_checkpoint(tiny_checkpoint.directory / "config.json")


def test_saving_twice_replaces(tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    other = save(tmp_path / "other", seed=31)
    save_checkpoint(load_checkpoint(tiny_checkpoint.directory), tmp_path / "out")
    save_checkpoint(load_checkpoint(other.directory), tmp_path / "out")
    state = load_checkpoint(tmp_path / "out").state_dict()
    for name, tensor in load_checkpoint(other.directory).state_dict().items():
        assert torch.equal(tensor, state[name])
