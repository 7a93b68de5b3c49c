"""Captioners composed of trained parts: a language model, a picture encoder, and every bridge between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from blip2edge.errors import CheckpointError, ConfigError  # noqa: E402
from blip2edge.model.checkpoint.directory import load_checkpoint  # noqa: E402
from blip2edge.training import run as runs  # noqa: E402
from blip2edge.training.config import load_config, parse_config  # noqa: E402
from blip2edge.training.key_rules import BRIDGE_SIZES  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from blip2edge.training.setup import pretrained  # noqa: E402
from blip2edge.training.setup.build import plan_parts  # noqa: E402
from tests import drawing  # noqa: E402
from tests.families import drawing_blip, drawing_llama  # noqa: E402
from tests.training import recipes  # noqa: E402

STEPS = "steps = 3\nbatch_size = 2\nwarmup_steps = 1\nmin_learning_rate = 0.0\n"
VALUES = {"hidden_size": 24, "intermediate_size": 48, "num_layers": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is half of the time of so small a run."""
    monkeypatch.setattr(runs, "draw_curve", lambda lines, path: False)


@pytest.fixture(scope="module", name="parts")
def _parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with: blip2 (OPT), clip, llama (bare), bert."""
    root = tmp_path_factory.mktemp("parts")
    drawing.save(root / "blip2", seed=6)
    drawing_blip.save_clip(root / "clip", 2)
    torch.manual_seed(3)
    llama = transformers.LlamaForCausalLM(drawing_llama.text_config(num_key_value_heads=4))
    drawing_llama.draw_weights(llama, 3)
    llama.save_pretrained(root / "llama")
    drawing_llama.tokenizer().save_pretrained(root / "llama")
    return root


def recipe(parts: Path, name: str, model: str, top: str = "", more: str = "") -> Path:
    path = parts / f"{name}.toml"
    stages = f"[stage2]\n{STEPS}{more}"
    new = "" if model.startswith("checkpoint") else sizes(parse_config(top).bridge)
    path.write_text(f'weights_dtype = "float32"\n{top}\n[model]\n{model}\n{new}{stages}')
    return path


def sizes(bridge: str) -> str:
    """The sizes that a new bridge has: any other key is refused."""
    lines = "".join(f"{key} = {VALUES[key]}\n" for key in BRIDGE_SIZES[bridge])
    return f"num_query_tokens = 4\n[model.qformer]\n{lines}" if lines else ""


@pytest.mark.parametrize("bridge", ["qformer", "projection", "mlp", "perceiver", "pool"])
def test_every_bridge_between_blip2s_eyes_and_a_bare_llama(bridge: str, parts: Path) -> None:
    path = recipe(parts, bridge, 'vision_from = "blip2"\nlanguage_from = "llama"', f'bridge = "{bridge}"')
    out = parts / f"out-{bridge}"
    record = train("stage2", path, out, evaluation_scenes=0)
    assert record["phases"]["stage2"]["final_loss"] > 0
    made = load_checkpoint(out)
    theirs = transformers.LlamaForCausalLM.from_pretrained(parts / "llama")
    rows = theirs.config.vocab_size
    table = made.language.get_parameter("embed_tokens.weight")
    assert torch.equal(table[:rows], theirs.get_input_embeddings().weight)
    eyes = load_checkpoint(parts / "blip2").vision
    assert recipes.tensor_hashes(made.vision) == recipes.tensor_hashes(eyes)
    if made.config.family == "blip-2":
        model = transformers.Blip2ForConditionalGeneration.from_pretrained(out)
        assert model.config.image_token_id == made.config.image_token_id
        transformers.AutoProcessor.from_pretrained(out)


def test_a_clip_and_an_mlp_make_a_llava(parts: Path) -> None:
    path = recipe(parts, "llava", 'vision_from = "clip"\nlanguage_from = "llama"', 'bridge = "mlp"')
    train("stage2", path, parts / "out-llava")
    assert load_checkpoint(parts / "out-llava").config.family == "llava"
    transformers.LlavaForConditionalGeneration.from_pretrained(parts / "out-llava")


def test_a_clip_and_a_llama_make_a_flamingo_whose_gates_open(parts: Path) -> None:
    path = recipe(parts, "flamingo", 'vision_from = "clip"\nlanguage_from = "llama"', 'bridge = "flamingo"')
    fresh = plan_parts("stage2", load_config(path), parts).build().model
    gates = [value for name, value in fresh.language.named_parameters() if name.endswith("_gate")]
    assert gates
    assert all(float(gate.detach().abs().max()) == 0.0 for gate in gates)
    train("stage2", path, parts / "out-flamingo")
    lines = [json.loads(line) for line in (parts / "out-flamingo" / "log.jsonl").read_text().splitlines()]
    assert all(value > 0 for value in lines[-1]["gauges"].values())
    assert set(lines[-1]["gauges"]) == {
        f"gate.{layer}.{part}_gate" for layer in range(2) for part in ("attention", "feed_forward")
    }
    transformers.IdeficsForVisionText2Text.from_pretrained(parts / "out-flamingo")


def test_a_language_model_is_swapped_on_a_kept_bridge(parts: Path) -> None:
    first = recipe(parts, "first", 'vision_from = "blip2"\nlanguage_from = "blip2"')
    first.write_text(first.read_text() + f"[stage1]\n{STEPS}embed_dim = 8\nmax_tokens = 12\n")
    train("stage1", first, parts / "stage1")
    kept = 'vision_from = "blip2"\nlanguage_from = "llama"\nbridge_from = "stage1"'
    texts = plan_parts("stage2", load_config(recipe(parts, "kept", kept)), parts).build().qformer_texts
    assert texts is not None
    assert texts.max_length == 12, "as many places as stage 1 gave, though this recipe would take 32"
    path = recipe(parts, "swapped", kept, 'bridge = "projection"', "itg_weight = 0.5\n")
    train("stage2", path, parts / "swapped", evaluation_scenes=0)
    given = load_checkpoint(parts / "swapped")
    from blip2edge.training.phases.stage1_checkpoint import open_stage1

    trained: Any = open_stage1(parts / "stage1").load().matcher
    own = given.bridge.get_submodule("qformer").state_dict()
    assert all(torch.equal(tensor, trained.qformer.state_dict()[name]) for name, tensor in own.items())
    assert given.draft is not None


def test_instruct_puts_the_prompt_into_the_qformer(parts: Path) -> None:
    path = recipe(parts, "instruct", 'vision_from = "blip2"\nlanguage_from = "llama"')
    path.write_text(path.read_text() + f"[instruct]\n{STEPS}\n")
    train("instruct", path, parts / "out-instruct")
    made = load_checkpoint(parts / "out-instruct")
    assert made.config.family == "instructblip"
    assert (parts / "out-instruct" / "qformer_tokenizer" / "tokenizer.json").is_file()
    transformers.InstructBlipForConditionalGeneration.from_pretrained(parts / "out-instruct")


def test_a_whole_checkpoint_is_gone_on_with(parts: Path) -> None:
    path = recipe(parts, "whole", 'checkpoint = "blip2"')
    train("stage2", path, parts / "out-whole", evaluation_scenes=0)
    before, after = (recipes.tensor_hashes(load_checkpoint(parts / name)) for name in ("blip2", "out-whole"))
    changed = {name.split(".")[0] for name in before if before[name] != after[name]}
    assert changed == {"bridge"}


@pytest.mark.parametrize(
    ("bridge", "model", "said"),
    [
        (
            "qformer",
            'vision_from = "clip"\nlanguage_from = "llama"',
            "does not support the picture encoder of a CLIP",
        ),
        ("flamingo", 'vision_from = "clip"\nlanguage_from = "blip2"', "needs a Llama"),
        (
            "flamingo",
            'vision_from = "blip2"\nlanguage_from = "llama"',
            "does not support the picture encoder of a BLIP-2",
        ),
        ("qformer", 'vision_from = "blip2"', "expected both vision_from and language_from"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(bridge: str, model: str, said: str, parts: Path) -> None:
    path = recipe(parts, "wrong", model, f'bridge = "{bridge}"')
    with pytest.raises(ConfigError, match=said):
        train("stage2", path, parts / "never")


def test_a_part_that_is_not_there_is_told(parts: Path) -> None:
    path = recipe(parts, "absent", 'vision_from = "blip2"\nlanguage_from = "./nowhere"')
    with pytest.raises(CheckpointError, match="nowhere"):
        train("stage2", path, parts / "never")


def test_a_missing_checkpoint_is_named_by_the_path_that_was_tried(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"there is no directory {tmp_path / 'gone'};"):
        pretrained.resolve("../../gone", tmp_path / "recipes" / "mine")
