"""The draft model from checkpoint to bundle to proposed tokens; captions do not depend on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from blip2edge import Captioner
from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DraftName
from blip2edge.cli import main
from blip2edge.errors import CheckpointError, UsageError
from blip2edge.export.draft_graph import DraftGraph, draft_spec
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.export.to_onnx import trace
from blip2edge.export.verify import compare_sample
from blip2edge.export.weights import write_weights
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import Checkpoint
from blip2edge.model.masks import attention_mask, mask_bias
from blip2edge.model.models import build_model
from blip2edge.runtime.captioning.encoder import StageClock
from blip2edge.runtime.decoding.draft_model import TextHeadDraft
from blip2edge.runtime.decoding.speculative import SpeculationCost
from tests.drafted import LENGTH, add_draft
from tests.drawing import Drawn, draw_pictures, save

TOKENS = 16


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Drawn, CaptionerModel, Path]:
    """A checkpoint with a draft, the model in torch, and its bundle."""
    directory = tmp_path_factory.mktemp("drafted") / "checkpoint"
    drawn = save(directory, seed=5, vision_layers=1)
    model = add_draft(directory)
    report = export_checkpoint(directory, directory.with_name("bundle"))
    names = [graph.name for graph in report.graphs]
    assert names == ["vision_encoder", "bridge", "decoder", "draft"]
    return drawn, model, report.bundle


@pytest.fixture
def captioner(drafted: tuple[Drawn, CaptionerModel, Path], monkeypatch: pytest.MonkeyPatch) -> Captioner:
    """The bundle, guessing at every step whether it pays or not."""
    monkeypatch.setattr(SpeculationCost, "pays", True)
    return Captioner.load(drafted[2], threads=1)


def test_the_bundle_tells_of_its_draft(drafted: tuple[Drawn, CaptionerModel, Path]) -> None:
    manifest = Bundle.open(drafted[2]).manifest
    config = drafted[1].config.draft
    assert manifest.draft is not None
    assert config is not None
    assert (manifest.draft.dec_token_id, manifest.draft.end_token_id) == (
        config.dec_token_id,
        config.end_token_id,
    )
    assert manifest.draft.max_positions == LENGTH
    bridge = [tensor.name for tensor in manifest.graphs["bridge"].spec.outputs]
    assert bridge[:3] == ["visual_tokens", "queries.0.key", "queries.0.value"]
    parity = {item.output: item.relative for item in manifest.graphs["bridge"].parity}
    assert parity.keys() == {"visual_tokens", "queries.key", "queries.value"}
    tensors = (drafted[2] / "draft.onnx.data").stat().st_size
    table = config.vocab_size * drafted[0].variant.qformer_width * 4
    assert tensors < 2 * table + 60_000  # the table is there once, for words and head


def test_a_sample_of_the_graphs_holds_the_whole_draft(
    drafted: tuple[Drawn, CaptionerModel, Path], tmp_path: Path
) -> None:
    source = Checkpoint(drafted[0].directory)
    with torch.device("meta"):
        module = DraftGraph(build_model(source.config).eval())  # type: ignore[arg-type]
    traced = trace(module, draft_spec(source.config))  # type: ignore[arg-type]
    weights = write_weights(traced, source.read, tmp_path / "draft.onnx.data", torch.float32)
    parity = compare_sample("draft", source.config, source.read, weights, "fp32")
    assert {item.output for item in parity} == {"logits", "present.key", "present.value"}
    assert {item.sample for item in parity} == {"whole"}


def test_the_draft_writes_what_torch_writes(drafted: tuple[Drawn, CaptionerModel, Path], captioner: Captioner) -> None:
    model = drafted[1]
    pictures = draw_pictures(3, 2)
    encoded = captioner.encoder(pictures, [None] * 3, StageClock())
    head = captioner.generator.drafts.head
    assert head is not None
    assert model.draft is not None
    config: Any = model.config.draft
    side = model.draft.text_side(model.bridge.qformer)
    texts = []
    for row in range(3):
        text = head.row(encoded.pictures, row)
        text._extend(10)
        ids = [config.dec_token_id]
        with torch.no_grad():
            pixels = torch.from_numpy(captioner.encoder.images.preprocessing.batch(pictures[row : row + 1]))
            _, key_values = model.bridge.qformer.read(model.vision(pixels))  # type: ignore[operator,union-attr]
            while len(ids) <= 10 and ids[-1] != config.end_token_id:
                whole = torch.tensor([ids])
                mask = attention_mask("itg", 5, torch.ones_like(whole))[:, 5:]
                bias = mask_bias(mask, torch.float32)
                logits, _ = side.write(whole, torch.arange(len(ids)), bias, key_values)
                ids.append(int(logits[0, -1].argmax()))
        assert text._text == [token for token in ids[1:] if token != config.end_token_id]
        texts.append(tuple(text._text))
    assert len(set(texts)) > 1  # they depend on the picture


def test_a_draft_goes_back_to_where_the_text_went_on_otherwise(captioner: Captioner) -> None:
    encoded = captioner.encoder(draw_pictures(1, 2), [None], StageClock())
    head = captioner.generator.drafts.head
    assert head is not None
    words = captioner.tokenizer.encode("red dog cats two it is", add_special_tokens=False)
    once: TextHeadDraft = head.row(encoded.pictures, 0)
    guesses = [once.propose(words[:size], 6) for size in (1, 2, 3, 6)]
    for size, guess in zip((1, 2, 3, 6), guesses, strict=True):  # what was read before leaves no trace
        assert head.row(encoded.pictures, 0).propose(words[:size], 6) == guess
    other = [*words[:2], words[0], words[4]]
    assert once.propose(other, 6) == head.row(encoded.pictures, 0).propose(other, 6)
    assert any(guesses)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.5, "min_new_tokens": 9},
    {"no_repeat_ngram_size": 2, "suppress_tokens": [9, 10, 11], "exponential_decay_length_penalty": (3, 1.2)},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("draft", ["auto", "itg", "lookup"])
def test_captions_do_not_depend_on_the_draft(captioner: Captioner, draft: DraftName, options: dict[str, Any]) -> None:
    pictures, passes = draw_pictures(2, 3), []
    for prompt in (None, "a photo of"):
        for picture in pictures:
            wanted = captioner.caption(picture, prompt=prompt, max_new_tokens=TOKENS, draft="none", **options)
            found = captioner.caption(picture, prompt=prompt, max_new_tokens=TOKENS, draft=draft, **options)
            assert found.tokens == wanted.tokens
            assert wanted.tokens_per_pass == 1.0
            passes.append(found.tokens_per_pass)
            pieces = captioner.stream(picture, prompt=prompt, max_new_tokens=TOKENS, draft=draft, **options)
            assert "".join(pieces).strip() == wanted.text
    if draft == "lookup" and not options:
        assert max(passes) > 1.0  # random models repeat themselves


@pytest.mark.parametrize("draft", ["itg", "lookup"])
def test_nobody_guesses_what_is_drawn(captioner: Captioner, draft: DraftName) -> None:
    picture = draw_pictures(1, 3)[0]
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 5, "seed": 1}
    alone = captioner.caption(picture, max_new_tokens=TOKENS, draft="none", **options)
    found = captioner.caption(picture, max_new_tokens=TOKENS, **options)
    assert (found.tokens, found.tokens_per_pass) == (alone.tokens, 1.0)
    for call in (captioner.caption, captioner.stream):
        with pytest.raises(UsageError, match="draft auto or none with temperature"):
            call(picture, draft=draft, **options)
    cold = captioner.caption(picture, max_new_tokens=TOKENS, draft=draft, temperature=0)  # greedy: nothing is drawn
    assert cold.tokens == captioner.caption(picture, max_new_tokens=TOKENS).tokens


def scripted(captioner: Captioner, texts: dict[int, tuple[int, ...]]) -> Callable[..., Any]:
    """A draft that knows the texts, but for every fifth token."""

    class Script:
        def __init__(self, tokens: tuple[int, ...]) -> None:
            self.tokens = tokens

        def propose(self, generated: Sequence[int], most: int) -> list[int]:
            at = range(len(generated), min(len(self.tokens), len(generated) + most))
            return [3 if place % 5 == 0 else self.tokens[place] for place in at]

    return lambda pictures, row: Script(texts[hash(pictures["visual_tokens"][row].tobytes())])


def test_captions_equal_transformers_in_few_passes(
    drafted: tuple[Drawn, CaptionerModel, Path], captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drafted[0]
    pictures = draw_pictures(5, 1)
    known = {}
    for picture in pictures:
        key = captioner.encoder([picture], [None], StageClock()).pictures["visual_tokens"][0].tobytes()
        known[hash(key)] = drawn.generate(picture, None, max_new_tokens=TOKENS)
    monkeypatch.setattr(captioner.generator.drafts.head, "row", scripted(captioner, known))
    for picture, tokens in zip(pictures, known.values(), strict=True):
        result = captioner.caption(picture, max_new_tokens=TOKENS)
        assert result.tokens == tokens
        assert result.tokens_per_pass > min(2.5, len(tokens) / 3)
    together = captioner.caption_many(pictures, batch_size=3, max_new_tokens=TOKENS)
    assert [result.tokens for result in together] == list(known.values())
    with captioner.scheduler(max_batch=2) as scheduler:
        requests = [scheduler.submit(picture, captioner.options(max_new_tokens=TOKENS)) for picture in pictures]
        assert [request.result(60).tokens for request in requests] == list(known.values())


def test_what_is_asked_for_by_name_must_be_there(
    drafted: tuple[Drawn, CaptionerModel, Path],
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    picture = draw_pictures(1)[0]
    with pytest.raises(UsageError, match=r"draft itg: the bundle has no draft model; use draft auto or none or lookup"):
        Captioner.load(tiny_bundle, draft="itg")
    with pytest.raises(UsageError, match="the bundle has no draft"):
        Captioner.load(tiny_bundle).caption(picture, draft="itg")
    without = Captioner.load(drafted[2], draft="none")
    assert without.generator.drafts.head is None
    assert "queries.0.key" not in without.encoder([picture], [None], StageClock()).pictures
    with pytest.raises(UsageError, match="the captioner was loaded with draft='none'"):
        without.caption(picture, draft="itg")
    picture.save(tmp_path / "picture.png")
    lines = []
    for draft in ("auto", "none", "itg", "lookup"):
        assert main(["caption", str(tmp_path / "picture.png"), "-b", str(drafted[2]), "--draft", draft]) == 0
        lines.append(capsys.readouterr().out)
    assert len(set(lines)) == 1
    assert main(["caption", str(tmp_path / "picture.png"), "-b", str(tiny_bundle), "--draft", "itg"]) == 2
    assert "the bundle has no draft" in capsys.readouterr().err


def test_a_draft_without_its_tokenizer(drafted: tuple[Drawn, CaptionerModel, Path], tmp_path: Path) -> None:
    shutil.copytree(drafted[0].directory, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "draft_tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has a draft model, but no draft_tokenizer.json; copy it"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    larger = tokenizers.Tokenizer.from_file(str(drafted[0].directory / "draft_tokenizer.json"))
    larger.add_special_tokens(["[MORE]"])
    larger.save(str(tmp_path / "checkpoint" / "draft_tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"draft_tokenizer.json gives the id 124, but the draft has 124 tokens"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
