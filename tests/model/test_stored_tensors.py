"""What a checkpoint's files may hold: tied tensors under any name, buffers, quantised weights, other layouts."""

from __future__ import annotations

import argparse
import collections
import json
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="model/ needs torch")
pytest.importorskip("transformers", reason="transformers is the oracle")

import numpy as np  # noqa: E402
from safetensors.torch import load_file, save_model  # noqa: E402
from transformers import Blip2ForConditionalGeneration, BlipForConditionalGeneration  # noqa: E402

from blip2edge.errors import CheckpointError  # noqa: E402
from blip2edge.model.checkpoint.directory import Checkpoint, load_checkpoint, save_checkpoint  # noqa: E402
from blip2edge.model.checkpoint.lavis import open_checkpoint  # noqa: E402
from blip2edge.model.checkpoint.stored.files import find_checkpoint, find_side_files  # noqa: E402
from blip2edge.model.weights.ties import stored_names  # noqa: E402
from blip2edge.training.setup.pretrained import open_language  # noqa: E402
from tests import drawing  # noqa: E402
from tests.drawing import rewrite_tensors  # noqa: E402
from tests.families import drawing_blip  # noqa: E402
from tests.families.drawing_instruct import draw_instructblip  # noqa: E402
from tests.families.test_t5 import KINDS  # noqa: E402
from tests.families.test_t5 import draw as draw_t5  # noqa: E402

CLOSE = 1e-5  # of the largest logit
OPT_TABLE, OPT_HEAD = "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"
T5 = {name: f"language_model.{name}.weight" for name in ("shared", "lm_head")}
T5 |= {part: f"language_model.{part}.embed_tokens.weight" for part in ("encoder", "decoder")}
FC1 = "language_model.model.decoder.layers.1.fc1.weight"


def pixels() -> Any:
    return torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32).sin()


@torch.no_grad()
def opt_logits(directory: Path) -> tuple[Any, Any]:
    """Logits of ours and of transformers' model of the directory."""
    ids = torch.tensor([[drawing.IMAGE] * 5 + [drawing.BOS, 7, 8, 9]])
    theirs, ours = Blip2ForConditionalGeneration.from_pretrained(directory).eval(), load_checkpoint(directory)
    got = ours(ours.visual_tokens(pixels()), ids[:, 5:])
    return got, theirs(pixel_values=pixels(), input_ids=ids).logits[:, 5:]


@torch.no_grad()
def t5_logits(directory: Path) -> tuple[Any, Any]:
    """The same of a T5, for a text with three tokens of an answer."""
    prompt, answer = torch.tensor([[drawing.IMAGE] * 5 + [7, 8, 9]]), torch.tensor([[0, 5, 6]])
    theirs, ours = Blip2ForConditionalGeneration.from_pretrained(directory).eval(), load_checkpoint(directory)
    language: Any = ours.language
    inputs = torch.cat([ours.visual_tokens(pixels()), language.embed_tokens(prompt[:, 5:])], dim=1)
    cross = language.cross_key_values(language.encode(inputs, torch.ones_like(prompt)))
    places = torch.arange(3)[None]
    got = language(language.embed_tokens(answer), torch.ones_like(answer), places, cross=cross)[0]
    return got, theirs(pixel_values=pixels(), input_ids=prompt, decoder_input_ids=answer).logits


def assert_close(pair: tuple[Any, Any]) -> None:
    assert (pair[0] - pair[1]).abs().max() <= CLOSE * pair[1].abs().max()


def test_ties_are_resolved_as_in_transformers() -> None:
    ties = (("encoder", "shared"), ("decoder", "shared"), ("head", "shared"))
    assert stored_names(ties, {"shared"}) == dict.fromkeys(("encoder", "decoder", "head"), "shared")
    assert stored_names(ties, {"decoder"}) == dict.fromkeys(("encoder", "shared", "head"), "decoder")
    assert stored_names(ties, {"decoder", "head"}) == dict.fromkeys(("encoder", "shared"), "decoder")
    assert stored_names(ties, {"head"}) == dict.fromkeys(("encoder", "decoder", "shared"), "head")
    assert stored_names(ties, {"encoder", "shared"}) == dict.fromkeys(("decoder", "head"), "shared")
    assert stored_names(ties, set()) == {}


def test_a_table_is_found_under_its_other_name(tmp_path: Path) -> None:
    model = drawing.save(tmp_path / "opt").model
    save_model(model, str(tmp_path / "opt" / "model.safetensors"), metadata={"format": "pt"})
    assert OPT_TABLE not in load_file(tmp_path / "opt" / "model.safetensors")
    assert_close(opt_logits(tmp_path / "opt"))
    assert load_checkpoint(tmp_path / "opt").config.language.tie_embeddings


@pytest.mark.parametrize("kept", ["decoder", "lm_head", "encoder"])
def test_a_t5_table_is_found_under_each_name(kept: str, tmp_path: Path) -> None:
    draw_t5(1, tmp_path, **KINDS[1])

    def rename(tensors: dict[str, Any]) -> None:
        table = tensors.pop(T5["shared"])
        for name in T5.values():
            tensors.pop(name, None)
        tensors[T5[kept]] = table

    rewrite_tensors(tmp_path, rename)
    assert_close(t5_logits(tmp_path))


def test_a_head_of_its_own_is_kept_even_if_the_config_ties_it(tmp_path: Path) -> None:
    drawing.save(tmp_path)
    rewrite_tensors(tmp_path, lambda t: t.update({OPT_HEAD: -t[OPT_TABLE]}))
    assert_close(opt_logits(tmp_path))
    assert not load_checkpoint(tmp_path).config.language.tie_embeddings
    rewrite_tensors(tmp_path, lambda t: t.update({OPT_HEAD: t[OPT_TABLE].clone()}))
    assert load_checkpoint(tmp_path).config.language.tie_embeddings


def test_t5_tables_that_differ(tmp_path: Path) -> None:
    draw_t5(1, tmp_path, **KINDS[0])
    rewrite_tensors(tmp_path, lambda t: t.update({T5["encoder"]: -t[T5["shared"]], T5["lm_head"]: t[T5["shared"]] * 2}))
    assert_close(t5_logits(tmp_path))  # the encoder never reads its table
    rewrite_tensors(tmp_path, lambda t: t.update({T5["decoder"]: t[T5["shared"]].clone()}))
    assert_close(t5_logits(tmp_path))
    rewrite_tensors(tmp_path, lambda t: t.update({T5["decoder"]: t[T5["shared"]].double()}))
    assert load_checkpoint(tmp_path)
    rewrite_tensors(tmp_path, lambda t: t.update({T5["decoder"]: -t[T5["shared"]]}))
    with pytest.raises(CheckpointError, match=r"decoder\.embed_tokens\.weight differs from .*shared\.weight"):
        load_checkpoint(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kept", ["bias", "decoder.bias", "both"])
def test_the_bias_of_blips_head_has_two_names(kept: str, tmp_path: Path) -> None:
    drawing_blip.save_blip(tmp_path, "caption", 1)
    names = {name: f"text_decoder.cls.predictions.{name}" for name in ("bias", "decoder.bias")}

    def change(tensors: dict[str, Any]) -> None:
        bias = next(tensors.pop(name) for name in names.values() if name in tensors)
        tensors.pop(names["decoder.bias"], None)
        tensors |= {name: bias + index for index, (key, name) in enumerate(names.items()) if kept in (key, "both")}

    rewrite_tensors(tmp_path, change)
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path)
    ours: Any = load_checkpoint(tmp_path).language
    assert torch.equal(ours.head.bias, theirs.text_decoder.cls.predictions.decoder.bias)


def test_a_language_model_alone_may_have_either_name(tmp_path: Path) -> None:
    drawn = drawing.save(tmp_path)
    drawn.model.language_model.save_pretrained(tmp_path)
    rewrite_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.decoder.embed_tokens.weight")}))
    state = open_language(str(tmp_path), tmp_path).state()
    assert torch.equal(state["embed_tokens.weight"], drawn.model.language_model.get_input_embeddings().weight)


def test_buffers_may_stand_in_a_file(tmp_path: Path) -> None:
    drawing.save(tmp_path)
    names = ("vision_model.embeddings.position_ids", "qformer.embeddings.position_ids", "qformer.masked_bias",
             "language_model.model.decoder.layers.0.self_attn.rotary_emb.inv_freq")  # fmt: skip
    rewrite_tensors(tmp_path, lambda t: t.update({name: torch.arange(4)[None] for name in names}))
    assert_close(opt_logits(tmp_path))


def test_buffers_and_tied_names_may_stand_in_a_pth(tmp_path: Path) -> None:
    model = drawing.save(tmp_path / "base").model
    state = {f"opt_model.{name}": tensor * 2 for name, tensor in model.language_model.state_dict().items()}
    assert {"opt_model.lm_head.weight", "opt_model.model.decoder.embed_tokens.weight"} <= state.keys()
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(8)[None]
    state["opt_model.model.decoder.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save({"model": state}, tmp_path / "trained.pth")
    checkpoint: Any = open_checkpoint(tmp_path / "trained.pth", tmp_path / "base")
    assert checkpoint.config.language.tie_embeddings
    assert torch.equal(checkpoint.read("language.head.weight"), state["opt_model.lm_head.weight"])
    checkpoint.files.close()
    state["opt_model.lm_head.weight"] = -state["opt_model.lm_head.weight"]
    torch.save({"model": state}, tmp_path / "trained.pth")
    checkpoint = open_checkpoint(tmp_path / "trained.pth", tmp_path / "base")
    assert not checkpoint.config.language.tie_embeddings
    assert torch.equal(checkpoint.read("language.head.weight"), state["opt_model.lm_head.weight"])
    checkpoint.files.close()


@pytest.fixture
def broken(tiny_checkpoint: drawing.Drawn, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint.directory, tmp_path / "broken"))


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def packed(suffix: str, dtype: Any = None) -> Callable[[dict[str, Any]], None]:
    """Stores FC1 as another dtype, with one more tensor beside it."""

    def change(tensors: dict[str, Any]) -> None:
        if dtype is not None:
            tensors[FC1] = tensors[FC1].to(dtype)
        else:
            tensors.pop(FC1)
        tensors[FC1.removesuffix("weight") + suffix] = torch.ones(4)

    return change


@pytest.mark.parametrize(
    ("config", "change", "told"),
    [
        ({"load_in_8bit": True}, packed("SCB", torch.int8), ("bitsandbytes, 8 bit", "SCB", "int8", FC1)),
        (None, packed("weight.absmax", torch.uint8), ("bitsandbytes", "uint8")),
        ({"quant_method": "gptq", "bits": 4}, packed("qweight"), ("gptq, 4 bit", "qweight")),
        ({"quant_method": "awq"}, packed("qzeros"), ("awq", "qzeros")),
        ({"quant_method": "fp8"}, packed("weight_scale_inv", torch.float8_e4m3fn), ("fp8", "float8_e4m3")),
        (None, packed("weight_packed"), ("compressed-tensors", "weight_packed")),
        ({"quant_method": "hqq"}, packed("W_q"), ("hqq", "W_q")),
        ({"quant_method": "torchao"}, lambda tensors: None, ("torchao", "delete that key")),
        (None, lambda tensors: tensors.update({FC1: tensors[FC1].to(torch.int8)}), (FC1, "int8")),
        (None, lambda tensors: tensors.update({FC1: tensors[FC1].to(torch.float8_e5m2)}), (FC1, "float8_e5m2")),
        (None, lambda tensors: tensors.update({FC1: tensors[FC1] > 0}), (FC1, "bool")),
    ],
)
def test_quantised_weights_are_named(config: Any, change: Any, told: tuple[str, ...], broken: Path) -> None:
    rewrite_tensors(broken, change)
    if config is not None:
        edit_config(broken, quantization_config=config)
    with pytest.raises(CheckpointError, match="quantised") as caught:
        Checkpoint(broken)
    for part in told:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_quantised_section_is_named(broken: Path) -> None:
    text = json.loads((broken / "config.json").read_text())["text_config"]
    edit_config(
        broken, text_config=text | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    )
    with pytest.raises(CheckpointError, match=r"text_config\.quantization_config \(bitsandbytes, 4 bit\)"):
        Checkpoint(broken)


def test_float64_is_read(broken: Path) -> None:
    wanted = load_checkpoint(broken).state_dict()
    rewrite_tensors(broken, lambda t: t.update({FC1: t[FC1].double()}))
    for name, tensor in load_checkpoint(broken).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pytorch_model.bin", "pickled"),
        ("pytorch_model-00001-of-00002.bin", "pickled"),
        ("model.fp16.safetensors", "variant"),
        ("model.gguf", "GGUF"),
        ("adapter_model.safetensors", "copy its adapter_config.json"),
        ("flax_model.msgpack", "Flax"),
        ("global_step10", "zero_to_fp32"),
        ("training_args.bin", "give a directory written by"),
    ],
)
def test_other_layouts_are_named(name: str, told: str, broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / name)
    with pytest.raises(CheckpointError, match=rf"has no model\.safetensors.*{told}"):
        Checkpoint(broken)


def test_a_run_names_its_last_folder(broken: Path, tmp_path: Path) -> None:
    for step in (5, 10, 100):
        shutil.copytree(broken, tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"checkpoint-100, checkpoint-10, checkpoint-5; .*run/checkpoint-100"):
        Checkpoint(tmp_path / "run")


EXTRAS: Mapping[str, Any] = {
    "namespace": argparse.Namespace(lr=1, betas=(0.9, 0.99)),
    "numpy scalar": np.float64(1.2),
    "numpy array": np.arange(3),
    "path": Path("run"),
    "ordered": collections.OrderedDict(a=1),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_objects_beside_the_tensors_of_a_pth_are_ignored(name: str, broken: Path, tmp_path: Path) -> None:
    base = load_checkpoint(broken)
    state = {
        f"opt_proj.{key}": value * 2 for key, value in base.get_submodule("bridge.projection").state_dict().items()
    }
    torch.save({"model": state, "extra": {"of": [EXTRAS[name]]}}, tmp_path / "trained.pth")
    checkpoint = open_checkpoint(tmp_path / "trained.pth", broken)
    assert torch.equal(checkpoint.read("bridge.projection.weight"), state["opt_proj.weight"])
    checkpoint.files.close()


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_no_code_of_a_pth_runs(broken: Path, tmp_path: Path) -> None:
    torch.save({"model": {"query_tokens": torch.ones(1, 5, 24)}, "extra": Runs(tmp_path / "ran")}, tmp_path / "a.pth")
    open_checkpoint(tmp_path / "a.pth", broken).files.close()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {"a": torch.ones(1), "config": argparse.Namespace(a=1)}}, "config of its model is no tensor"),
        ({"model": Path("run")}, "its model is an object"),
        ({"state_dict": {}, "epoch": 3}, 'expected {"model": tensors by name}, found epoch, state_dict'),
        (3, "found int"),
        (
            {"model": {}, "extra": collections.defaultdict(list, a=[1])},
            "objects of builtins.list, collections.defaultdict",
        ),
        ({"model": {}, "extra": collections.deque([1, 2])}, "objects of collections.deque"),
        ({"model": {"opt_proj.bias": torch.ones(32, dtype=torch.int8)}}, "opt_proj"),
    ],
)
def test_the_message_about_a_pth_is_plain(content: Any, told: str, broken: Path, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a.pth", broken)
    text = str(caught.value)
    assert told in text or "language_projection.bias as int8" in text
    assert "; save" in text
    assert "\x1b" not in text
    assert "\n" not in text
    assert "weights_only" not in text


def test_a_download_has_every_file_and_no_run_of_a_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_checkpoint("owner/name") == tmp_path
    names = (
        *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "draft.safetensors"),
        *("adapter_config.json", "adapter_model.safetensors", "stage1.json", "preprocessor_config.json"),
        *("tokenizer.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "chat_template.jinja"),
        "qformer_tokenizer/vocab.txt",
    )
    others = ("checkpoint-5/model.safetensors", "pytorch_model.bin", "training_args.bin", "tf_model.h5", "picture.png")

    def fetched(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) and not any(
            fnmatch(name, pattern) for pattern in asked["ignore_patterns"]
        )

    assert [name for name in (*names, *others) if fetched(name)] == list(names)


def test_every_side_file_comes_along(tmp_path: Path) -> None:
    draw_instructblip(tmp_path / "from", 1, "t5")
    names = ("vocab.txt", "sentencepiece.bpe.model", "video_preprocessor_config.json", "chat_template.jinja",
             "qformer_tokenizer/vocab.txt", "qformer_tokenizer/special_tokens_map.json", "added_tokens.json",
             "additional_chat_templates/rag.jinja", "draft_tokenizer.json")  # fmt: skip
    for name in names:
        (tmp_path / "from" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "from" / name).write_text(f'{{"name": "{name}"}}')
    for name in ("trainer_state.json", "README.md", "quantize_config.json"):
        (tmp_path / "from" / name).write_text("{}")
    save_checkpoint(load_checkpoint(tmp_path / "from"), tmp_path / "to", like=tmp_path / "from")
    found = find_side_files(tmp_path / "to")
    assert set(names) <= found.keys()
    assert found.keys() == find_side_files(tmp_path / "from").keys()
    for name, path in found.items():
        assert path.read_bytes() == (tmp_path / "from" / name).read_bytes()
    assert {"trainer_state.json", "README.md"}.isdisjoint(path.name for path in (tmp_path / "to").iterdir())
    checkpoint = Checkpoint(tmp_path / "to")
    assert {path.name for path in checkpoint.paths()} >= {Path(name).name for name in names}
    checkpoint.files.close()
