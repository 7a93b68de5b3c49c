"""PEFT adapters: merged into the base as transformers and peft apply them, or refused with an error that names them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="model/ needs torch")
pytest.importorskip("transformers", reason="transformers is the oracle")
peft = pytest.importorskip("peft", reason="peft merges adapters")

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Blip2ForConditionalGeneration, BlipForConditionalGeneration  # noqa: E402

from blip2edge.errors import CheckpointError, MissingPackageError, UnsupportedModelError, UsageError  # noqa: E402
from blip2edge.model.checkpoint.adapters.folder import MERGED_TYPES  # noqa: E402
from blip2edge.model.checkpoint.directory import Checkpoint, load_checkpoint, load_model  # noqa: E402
from blip2edge.model.checkpoint.lavis import open_checkpoint  # noqa: E402
from tests import drawing  # noqa: E402
from tests.families import drawing_blip, drawing_idefics, drawing_instruct, drawing_llama  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

CLOSE = 1e-4  # of the largest logit: adapters are applied in another order; seen: 4e-6
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERIES = drawing.Variant().queries


def add_adapter(model: Any, kind: str = "LORA", seed: int = 5, **options: Any) -> Any:
    """The model with a drawn adapter, on its queries and values unless ``options`` say otherwise."""
    sizes = {"r": 4, "lora_alpha": 16} if kind == "LORA" else {}
    with torch.no_grad():
        torch.manual_seed(seed)
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
        adapted = peft.get_peft_model(model, config(**{"target_modules": ["q_proj", "v_proj"], **sizes, **options}))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return adapted.eval()


@torch.no_grad()
def logits(model: Any) -> Any:
    """Logits of transformers' BLIP-2 behind a picture."""
    ids = torch.tensor([[drawing.IMAGE] * QUERIES + [drawing.BOS, 7, 8, 9]])
    return model(pixel_values=pixels(), input_ids=ids).logits[:, QUERIES:]


@torch.no_grad()
def our_logits(directory: Path) -> Any:
    model = load_checkpoint(directory)
    return model(model.visual_tokens(pixels()), torch.tensor([[drawing.BOS, 7, 8, 9]]))


def pixels() -> Any:
    return torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32).sin()


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def adapted(directory: Path, **options: Any) -> tuple[Any, Any]:
    """Saves a checkpoint with an adapter beside its weights; gives its logits, and those of its base."""
    base = drawing.save(directory).model
    without = logits(base)
    model = add_adapter(base, **options)
    wanted = logits(model)
    model.save_pretrained(directory)
    return wanted, without


LORAS: Mapping[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "fc1"]},
    "vision": {"target_modules": ["qkv", "projection", "patch_embedding"]},
    "qformer": {"target_modules": ["query", "value", "dense"]},
    "all": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*decoder\.layers\.1\.fc[12]"},
    "table": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "modules_to_save": {"modules_to_save": ["language_projection"]},
    "both tables saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tables saved as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [4, 7]},
    "patterns": {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 3}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("name", LORAS)
def test_every_lora_is_merged(name: str, tmp_path: Path) -> None:
    wanted, without = adapted(tmp_path, **LORAS[name])
    assert (wanted - without).abs().max() > 0.1, "the adapter must matter"
    assert (our_logits(tmp_path) - wanted).abs().max() <= CLOSE * wanted.abs().max()


TYPES: Mapping[str, dict[str, Any]] = {
    "LORA": {},
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "HRA": {},
    "IA3": {"target_modules": ["q_proj", "fc2"], "feedforward_modules": ["fc2"]},
    "LOHA": {},
    "LOKR": {},
    "OFT": {"oft_block_size": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [7, 8]},
    "VERA": {"r": 4},
}


@pytest.mark.parametrize("kind", MERGED_TYPES)
def test_every_type_is_merged(kind: str, tmp_path: Path) -> None:
    wanted, without = adapted(tmp_path, kind=kind, **TYPES[kind])
    assert (wanted - without).abs().max() > 0.1, "the adapter must matter"
    assert (our_logits(tmp_path) - wanted).abs().max() <= CLOSE * wanted.abs().max()


FAMILIES: Mapping[str, Callable[[Path], Any]] = {
    "blip-2-itm": lambda directory: drawing_blip.save_blip2(directory, 1)[0],
    "clip": lambda directory: drawing_blip.save_clip(directory, 1)[0],
    "idefics": lambda directory: drawing_idefics.draw_idefics(directory, 1)[0],
    "instructblip": lambda directory: drawing_instruct.draw_instructblip(directory, 1, "t5")[0],
    "llava": lambda directory: drawing_llama.draw_llava(directory, 1)[0],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_merged_as_peft_merges_it(family: str, tmp_path: Path) -> None:
    model = add_adapter(FAMILIES[family](tmp_path / "adapted"), target_modules="all-linear")
    without = load_model(tmp_path / "adapted").state_dict()
    model.save_pretrained(tmp_path / "adapted")
    got = load_model(tmp_path / "adapted").state_dict()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    changed = 0
    for name, wanted in load_model(tmp_path / "merged").state_dict().items():
        assert torch.allclose(got[name], wanted, atol=1e-5), name
        changed += not torch.equal(wanted, without[name])
    assert changed >= 10


@torch.no_grad()
def test_a_tied_head_stays_as_it_was_where_its_table_is_changed(tmp_path: Path) -> None:
    theirs, _ = drawing_blip.save_blip(tmp_path, "caption", 1)
    add_adapter(theirs, target_modules=["word_embeddings", "query"]).save_pretrained(tmp_path)
    oracle = BlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    wanted = oracle.text_decoder(ids, encoder_hidden_states=oracle.vision_model(pixels())[0]).logits
    ours = load_checkpoint(tmp_path)
    language: Any = ours.language
    cross = language.cross_key_values(ours.vision(pixels()))
    got = language(language.embed_tokens(ids), torch.ones_like(ids), torch.arange(4)[None], cross=cross)[0]
    assert not torch.equal(language.embed_tokens.weight, language.head.weight)
    assert (got - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """An adapter in a Trainer's folder, its base, and the logits."""
    root = tmp_path_factory.mktemp("apart")
    base = drawing.save(root / "base").model
    model = add_adapter(base)
    wanted = logits(model)
    model.save_pretrained(root / "run" / "checkpoint-500")
    edit(root / "run" / "checkpoint-500" / CONFIG, base_model_name_or_path=str(root / "base"))
    (root / "run" / "checkpoint-500" / "training_args.bin").write_bytes(b"x")
    return root / "run" / "checkpoint-500", root / "base", wanted


def test_an_adapter_in_a_folder_of_its_own_finds_its_base(apart: tuple[Path, Path, Any]) -> None:
    adapter, base, wanted = apart
    checkpoint = Checkpoint(adapter)
    checkpoint.files.close()
    assert (checkpoint.given, checkpoint.directory, checkpoint.side_directory()) == (adapter, base, base)
    assert {path.name for path in checkpoint.paths()} >= {CONFIG, WEIGHTS, "model.safetensors", "tokenizer.json"}
    assert (our_logits(adapter) - wanted).abs().max() <= CLOSE * wanted.abs().max()
    theirs = Blip2ForConditionalGeneration.from_pretrained(adapter).eval()
    assert torch.equal(logits(theirs), wanted)


@pytest.fixture
def copied(apart: tuple[Path, Path, Any], tmp_path: Path) -> Path:
    """A copy of the adapter that a test may change; the base that it names does not exist."""
    adapter = Path(shutil.copytree(apart[0], tmp_path / "adapter"))
    edit(adapter / CONFIG, base_model_name_or_path="owner/not-on-this-machine")
    return adapter


def test_a_base_that_is_not_here_is_named_and_can_be_given(apart: tuple[Path, Path, Any], copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter.*owner/not-on-this-machine is not on this machine.*base"):
        load_checkpoint(copied)
    checkpoint = open_checkpoint(copied, apart[1])
    checkpoint.files.close()
    assert checkpoint.directory == apart[1]
    with pytest.raises(UsageError, match="leave base out"):
        open_checkpoint(apart[1], apart[1])


def test_a_pickled_adapter_is_merged_too(apart: tuple[Path, Path, Any], copied: Path) -> None:
    torch.save(load_file(copied / WEIGHTS), copied / "adapter_model.bin")
    (copied / WEIGHTS).unlink()
    edit(copied / CONFIG, base_model_name_or_path=str(apart[1]))
    assert (our_logits(copied) - apart[2]).abs().max() <= CLOSE * apart[2].abs().max()


def test_a_tokenizer_beside_the_adapter_goes_first(apart: tuple[Path, Path, Any], copied: Path) -> None:
    shutil.copy(apart[1] / "tokenizer.json", copied)
    edit(copied / "tokenizer.json", marked=True)
    checkpoint = open_checkpoint(copied, apart[1])
    folder = checkpoint.side_directory()
    assert "marked" in (folder / "tokenizer.json").read_text()
    assert not (folder / "tokenizer_config.json").exists(), "it belongs to the other tokenizer"
    wanted = (apart[1] / "processor_config.json").read_text()
    assert (folder / "processor_config.json").read_text() == wanted
    checkpoint.files.close()
    assert not folder.exists()


def test_a_run_of_a_trainer_names_its_folders(apart: tuple[Path, Path, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-500.*give the folder itself: .*checkpoint-500"):
        load_checkpoint(apart[0].parent)


def test_two_adapters_are_not_one(apart: tuple[Path, Path, Any], copied: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(apart[1], tmp_path / "base"))
    shutil.copy(apart[0] / CONFIG, base)
    shutil.copy(apart[0] / WEIGHTS, base)
    with pytest.raises(CheckpointError, match=r"base .* is an adapter itself.*merge_and_unload"):
        open_checkpoint(copied, base)


def test_without_peft_the_adapter_is_named(apart: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"adapter_config\.json.*pip install 'blip2edge\[peft\]'"):
        load_checkpoint(apart[0])


def test_the_model_must_be_one_of_transformers(tmp_path: Path) -> None:
    model, _ = drawing_llama.draw_minigpt4(tmp_path, 3)
    add_adapter(model).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no class MiniGPT4"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"peft_type": "LN_TUNING"}, "LN_TUNING"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
        ({"target_modules": ["nothing"]}, "does not fit its base"),
        ({"target_modules": ["q_proj"]}, "unknown tensors: .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "fc1"]}, "lacks .*fc1"),
        ({"r": 7}, "does not fit its base"),
    ],
)
def test_what_cannot_be_merged_is_named(
    values: dict[str, Any], told: str, apart: tuple[Path, Path, Any], copied: Path
) -> None:
    edit(copied / CONFIG, base_model_name_or_path=str(apart[1]), **values)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_checkpoint(copied)
    assert "adapter" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_more_than_its_class_is_named(tmp_path: Path) -> None:
    adapted(tmp_path, target_modules=["embed_positions"])
    with pytest.raises(CheckpointError, match="embed_positions is of the class OPTLearnedPositionalEmbedding"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (WEIGHTS, None, r"but no adapter_model\.safetensors and no adapter_model\.bin"),
        (WEIGHTS, b"", r"adapter_model\.safetensors cannot be read as a whole safetensors file"),
        ("adapter_model.bin", b"hello", r"adapter_model\.bin cannot be read as a file of tensors"),
        (CONFIG, b"{", r"adapter_config\.json cannot be read as JSON"),
    ],
)
def test_broken_files_of_an_adapter_are_named(
    name: str, content: bytes | None, told: str, apart: tuple[Path, Path, Any], copied: Path
) -> None:
    if name != CONFIG:
        (copied / WEIGHTS).unlink()
    if content is not None:
        (copied / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=told) as caught:
        open_checkpoint(copied, apart[1])
    assert "\x1b" not in str(caught.value)


def test_an_adapter_of_an_older_transformers_is_merged(tmp_path: Path) -> None:
    model = add_adapter(drawing_llama.draw_llava(tmp_path, 1)[0])
    model.save_pretrained(tmp_path)
    wanted = load_model(tmp_path).state_dict()
    tensors = load_file(tmp_path / WEIGHTS)
    older = {name.replace("model.language_model.", "language_model.model."): part for name, part in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, tmp_path / WEIGHTS)
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("layer", [0, 1])
def test_an_adapter_with_nan_is_named(layer: int, apart: tuple[Path, Path, Any], copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS)
    name = next(name for name in tensors if f"decoder.layers.{layer}." in name and "lora_B" in name)
    save_file(tensors | {name: tensors[name] * float("nan")}, copied / WEIGHTS)
    edit(copied / CONFIG, base_model_name_or_path=str(apart[1]))
    with pytest.raises(CheckpointError, match=rf"adapter.*decoder\.layers\.{layer}.*NaNs"):
        load_checkpoint(copied)


def test_a_model_saved_with_its_adapter_inside_is_named(tmp_path: Path) -> None:
    model = add_adapter(drawing.save(tmp_path).model)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in model.state_dict().items()}
    state.pop("language_model.lm_head.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a PEFT adapter that is not merged.*merge_and_unload"):
        load_checkpoint(tmp_path)
