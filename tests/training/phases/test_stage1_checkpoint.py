"""Initial weights and output of stage 1, compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, BertModel, Blip2ForImageTextRetrieval

from blip2edge.errors import CheckpointError, UsageError
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from blip2edge.model.config import CaptionerConfig, DraftConfig, QFormerConfig
from blip2edge.model.language.opt import OPTConfig
from blip2edge.training.loading.qformer_texts import QFormerTexts
from blip2edge.training.phases.stage1 import query_text_similarity, text_loss
from blip2edge.training.phases.stage1_checkpoint import (
    begin_stage2,
    draw_weights,
    open_stage1,
    save_stage1,
    start_from_bert,
)
from tests.drawing import randomize
from tests.families.drawing_blip import VOCABULARY as BERT_WORDS
from tests.families.drawing_blip import save_blip2
from tests.training.drawing_stage1 import (
    DEC,
    PAD,
    SEP,
    VOCABULARY,
    draw_batch,
    draw_stage1,
)


def bert(head: bool = True, **changes: Any) -> Any:
    """A BERT of the tiny Q-Former's sizes, whose vocabulary lacks [DEC]."""
    sizes = {
        "vocab_size": VOCABULARY - 1,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        **changes,
    }
    torch.manual_seed(4)
    model = (BertForMaskedLM if head else BertModel)(BertConfig(**sizes)).eval()
    randomize(model)
    return model


def captioner(config: Any, draft: DraftConfig | None) -> CaptionerModel:
    """A captioner around the Q-Former of a first stage."""
    text = config.text
    names = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_query_tokens")
    sizes = {name: getattr(text, name) for name in names}
    bridge = QFormerConfig(**sizes, encoder_hidden_size=text.encoder_hidden_size)
    language = OPTConfig(vocab_size=30, hidden_size=16, ffn_dim=24, num_layers=1, num_heads=2, max_positions=40)
    return CaptionerModel(CaptionerConfig(config.vision, bridge, language, draft=draft)).eval()


def test_scores_of_a_converted_checkpoint_equal_transformers(tmp_path: Path) -> None:
    theirs, _ = save_blip2(tmp_path / "given", 1)
    draft = DraftConfig(BERT_WORDS, 40, 2, 3, 0)
    model = open_stage1(tmp_path / "given", draft).load()
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 5, 6, 3, 0]])
    mask = (ids != 0).long()
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    save_stage1(model, tmp_path / "saved")
    again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        embeds = model.vision(pixels)
        match = model.matcher.match(embeds, ids, mask)
        features = model.matcher.image_features(embeds)
        contrast = query_text_similarity(features, model.matcher.text_embeds(ids, mask))
        for oracle in (theirs, again):
            wanted = oracle(**given, use_image_text_matching_head=True).logits_per_image
            torch.testing.assert_close(match, wanted, atol=1e-5, rtol=1e-5)
            wanted = oracle(**given, use_image_text_matching_head=False).logits_per_image
            torch.testing.assert_close(contrast, wanted, atol=1e-5, rtol=1e-5)


def test_a_first_stage_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = draw_stage1()
    with torch.no_grad():
        model.temperature.fill_(0.05)
    save_stage1(model, tmp_path)
    copy = open_stage1(tmp_path).load()
    assert copy.config == model.config
    assert copy.draft_config == model.draft_config
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in copy.state_dict().items())


def test_bert_gives_the_text_side_and_the_queries_a_copy(tmp_path: Path) -> None:
    theirs = bert()
    theirs.save_pretrained(tmp_path)
    model = draw_stage1(3)
    drawn = start_from_bert(model, tmp_path, torch.Generator().manual_seed(0))
    table = theirs.bert.embeddings.word_embeddings.weight.detach()
    qformer: Any = model.matcher.qformer
    assert torch.equal(qformer.word_embeddings.weight[:DEC], table)
    assert 0 < float(qformer.word_embeddings.weight[DEC].detach().norm()) < 0.2
    assert torch.equal(model.head.dense.weight, theirs.cls.predictions.transform.dense.weight)
    assert torch.equal(model.head.bias[:DEC], theirs.cls.predictions.bias)
    for ours, other in zip(qformer.layers, theirs.bert.encoder.layer, strict=True):
        assert torch.equal(ours.self_attention.key.weight, other.attention.self.key.weight)
        assert torch.equal(ours.feed_forward.up.weight, other.intermediate.dense.weight)
        assert torch.equal(ours.text_feed_forward.up.weight, other.intermediate.dense.weight)
        assert ours.feed_forward.up.weight is not ours.text_feed_forward.up.weight
    assert all("text_feed_forward" not in name and "self_attention" not in name for name in drawn)
    cross = qformer.layers[0].cross_attention.query.weight.detach()
    assert 0.01 < float(cross.std()) < 0.03
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    with torch.no_grad():  # BERT has token types beside words and places; a Q-Former has none
        theirs.bert.embeddings.token_type_embeddings.weight.zero_()
        wanted = theirs.bert(input_ids=ids).last_hidden_state
        torch.testing.assert_close(qformer.read_text(ids, torch.ones_like(ids)), wanted, atol=1e-5, rtol=1e-5)


def test_bert_without_its_head_and_what_is_no_bert(tmp_path: Path) -> None:
    bert(head=False).save_pretrained(tmp_path / "bare")
    drawn = start_from_bert(draw_stage1(), tmp_path / "bare")
    assert "head.dense.weight" in drawn
    bert(hidden_size=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"has shape \[.*16\], but the Q-Former needs \[.*12\]"):
        start_from_bert(draw_stage1(), tmp_path / "wide")
    (tmp_path / "other").mkdir()
    save_file({"head.weight": torch.zeros(2)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(CheckpointError, match="which every BERT has; give the directory or hub name of a BERT"):
        start_from_bert(draw_stage1(), tmp_path / "other")


def test_the_second_stage_starts_where_the_first_ended(tmp_path: Path) -> None:
    stage1 = draw_stage1()
    model = captioner(stage1.config, stage1.draft_config)
    begin_stage2(stage1, model)
    images, texts = draw_batch(3)
    with torch.no_grad():
        queries, key_values = model.bridge.qformer.read(images)  # type: ignore[operator,union-attr]
        wanted, _ = stage1.matcher.qformer.read(images)  # type: ignore[operator,union-attr]
        assert torch.equal(queries, wanted)
        assert model.draft is not None
        side = model.draft.text_side(model.bridge.qformer)
        ours = text_loss(side, key_values, texts, DEC)
        assert torch.equal(ours, stage1(images, texts, lambda weights: torch.tensor([1, 2, 0]))["itg"])
    save_checkpoint(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "draft.safetensors", "draft.json"
    }  # fmt: skip
    copy = load_checkpoint(tmp_path)
    assert copy.config.draft == stage1.draft_config
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in copy.state_dict().items())
    narrow = captioner(draw_stage1().config, None)
    narrow.bridge.qformer.query_tokens = torch.nn.Parameter(torch.zeros(1, 2, 12))  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="has other sizes in this model than in stage 1: query_tokens"):
        begin_stage2(stage1, narrow)


def test_a_draft_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    stage1 = draw_stage1()
    model = captioner(stage1.config, stage1.draft_config)
    save_checkpoint(model, tmp_path)
    path = tmp_path / "draft.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"dec_token_id": 99}))
    with pytest.raises(CheckpointError, match=r"dec_token_id 99 must be below vocab_size 19"):
        load_checkpoint(tmp_path)
    path.write_text(json.dumps(values | {"vocab_size": 20}))
    with pytest.raises(CheckpointError, match=r"check that config.json belongs to these weights"):
        load_checkpoint(tmp_path)
    path.write_text(json.dumps(values))
    (tmp_path / "draft.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"draft.safetensors cannot be read as a whole safetensors file"):
        load_checkpoint(tmp_path)


def test_what_is_no_first_stage(tmp_path: Path) -> None:
    save_checkpoint(captioner(draw_stage1().config, None), tmp_path / "captioner")
    with pytest.raises(CheckpointError, match=r"found no draft.json; give the output of stage 1"):
        open_stage1(tmp_path / "captioner").load()
    with pytest.raises(CheckpointError, match="found the family blip-2;"):
        open_stage1(tmp_path / "captioner", DraftConfig(19, 16, DEC, SEP, PAD)).load()
    save_blip2(tmp_path / "given", 1)
    with pytest.raises(CheckpointError, match=r"has 19 tokens, but vocab_size in config.json is 90"):
        open_stage1(tmp_path / "given", DraftConfig(19, 16, DEC, SEP, PAD)).load()


def test_texts_get_the_special_tokens_that_their_tokenizer_lacks() -> None:
    words = {"[UNK]": 0, "[PAD]": 1, "red": 2, "dog": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = QFormerTexts(backend, max_length=5)
    assert backend.get_vocab_size() == 4  # the caller's stays as it was
    assert texts.draft_config() == DraftConfig(7, 5, dec_token_id=6, end_token_id=5, pad_token_id=1)
    batch = texts(["Red dog", "dog dog dog red"], [3, 4])
    assert batch.input_ids.tolist() == [[4, 2, 3, 5, 1], [4, 3, 3, 3, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.pictures is not None
    assert batch.pictures.tolist() == [3, 4]
    with pytest.raises(UsageError, match="at least 3 tokens"):
        QFormerTexts(backend, max_length=2)


def test_weights_are_drawn_as_bert_draws_them() -> None:
    model = draw_stage1()
    vision = {name: tensor.clone() for name, tensor in model.vision.state_dict().items()}
    draw_weights(model, torch.Generator().manual_seed(0))
    qformer: Any = model.matcher.qformer
    assert 0.01 < float(qformer.query_tokens.detach().std()) < 0.03
    assert torch.equal(qformer.norm.weight, torch.ones(12))
    assert float(model.temperature.detach()) == pytest.approx(0.07)
    assert all(torch.equal(tensor, vision[name]) for name, tensor in model.vision.state_dict().items())
    assert (model.draft_config.pad_token_id, model.draft_config.end_token_id) == (PAD, SEP)
