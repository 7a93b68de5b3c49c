"""Examples before a sample (few-shot): drawn from other pictures, seen by their own text alone, without loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate import Accelerator  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from blip2edge.errors import ConfigError, DataError  # noqa: E402
from blip2edge.model.checkpoint.directory import load_checkpoint  # noqa: E402
from blip2edge.model.checkpoint.image_processor import load_preprocessing  # noqa: E402
from blip2edge.runtime.text.tokenizer import Tokenizer  # noqa: E402
from blip2edge.training import run as runs  # noqa: E402
from blip2edge.training.config import parse_config  # noqa: E402
from blip2edge.training.data.config import DataConfig  # noqa: E402
from blip2edge.training.data.entries import BrokenSamples, Entry, FilePicture  # noqa: E402
from blip2edge.training.data.list_source import ListSource  # noqa: E402
from blip2edge.training.data.sources import Sample  # noqa: E402
from blip2edge.training.loading.batches import IGNORED  # noqa: E402
from blip2edge.training.loading.caption_texts import CaptionTexts  # noqa: E402
from blip2edge.training.loading.features import FrozenEncoder  # noqa: E402
from blip2edge.training.loading.loader import Loader, PictureBatch, TextMakers  # noqa: E402
from blip2edge.training.phases.stage2 import GenerativeStage  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from tests.drawing import draw_pictures  # noqa: E402
from tests.families.drawing_idefics import draw_idefics  # noqa: E402

TEXTS = (("what is", "a red dog"), ("a photo of", "two cats"), ("what is", "two"), ("", "a photo"))


def sample(number: int, shots: tuple[int, ...] = ()) -> Sample:
    """A sample with examples, by number."""
    prompt, text = TEXTS[number]
    picture = draw_pictures(len(TEXTS), 3)[number]
    return Sample(f"s{number}", f"p{number}", lambda: picture, text, prompt, tuple(sample(shot) for shot in shots))


ASKED = (sample(0, (1, 2)), sample(2, (3, 0)), sample(1, (0, 2)))


class Flamingo:
    """Transformers' Idefics and ours."""

    def __init__(self, directory: Path) -> None:
        self.theirs, processor = draw_idefics(directory, 3)
        self.processor: Any = processor
        self.ours = load_checkpoint(directory)
        tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
        self.texts = TextMakers(CaptionTexts(self.ours.config, tokenizer, 16))
        self.encoder = FrozenEncoder(self.ours.vision, load_preprocessing(directory).preprocessing, Accelerator())
        self.stage = GenerativeStage(self.ours, "flamingo").eval()

    def batch(self, samples: tuple[Sample, ...]) -> PictureBatch:
        shown = [picture for each in samples for picture in each.pictures]
        embeds = self.encoder.encode(shown, [self.encoder.open(each) for each in shown])
        return self.texts.batch(samples, embeds)

    def wanted(self, samples: tuple[Sample, ...]) -> float:
        """The loss that transformers gives, on the texts of the samples themselves."""
        total, count = 0.0, 0
        for each in samples:
            row: list[Any] = []
            for shown in each.shots:
                row += [shown.open_picture(), f"{shown.prompt} {shown.text}</s>"]
            inputs = self.processor(
                text=[[*row, each.open_picture(), f"{each.prompt} {each.text}"]],
                add_end_of_utterance_token=False,
                return_tensors="pt",
            )
            ids = torch.cat([inputs["input_ids"], torch.tensor([[2]])], dim=1)  # the end token
            more = inputs["image_attention_mask"][:, -1:]
            logits = self.theirs(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs["pixel_values"],
                image_attention_mask=torch.cat([inputs["image_attention_mask"], more], dim=1),
            ).logits
            length = len(each.text.split()) + 1
            found = F.cross_entropy(logits[0, -length - 1 : -1], ids[0, -length:], reduction="sum")
            total, count = total + float(found), count + length
        return total / count


@pytest.fixture(scope="module")
def flamingo(tmp_path_factory: pytest.TempPathFactory) -> Flamingo:
    return Flamingo(tmp_path_factory.mktemp("flamingo"))


@torch.no_grad()
def test_the_loss_with_examples_is_that_of_transformers(flamingo: Flamingo) -> None:
    batch = flamingo.batch(ASKED)
    assert batch.pictures == 3
    loss = float(flamingo.stage(batch)["loss"])
    assert loss == pytest.approx(flamingo.wanted(ASKED), rel=1e-5)
    alone = tuple(replace(each, shots=()) for each in ASKED)
    assert float(flamingo.stage(flamingo.batch(alone))["loss"]) == pytest.approx(flamingo.wanted(alone), rel=1e-5)
    assert loss != pytest.approx(flamingo.wanted(alone), rel=1e-2)


@torch.no_grad()
def test_samples_with_other_numbers_of_examples_share_a_batch(flamingo: Flamingo) -> None:
    """As in a mixture: what pads the pictures is seen by no text."""
    mixed = (sample(0, (1, 2)), sample(2), sample(1, (3,)))
    batch = flamingo.batch(mixed)
    assert batch.pictures == 3
    assert len(batch.image_embeds) == 9
    assert float(flamingo.stage(batch)["loss"]) == pytest.approx(flamingo.wanted(mixed), rel=1e-5)


def test_each_text_sees_its_own_picture_and_the_last_one_alone_gives_loss(flamingo: Flamingo) -> None:
    captions = flamingo.batch(ASKED[:1]).captions
    assert captions is not None
    assert captions.picture_mask is not None
    tokenizer = flamingo.processor.tokenizer
    words = tokenizer.convert_ids_to_tokens(captions.input_ids[0].tolist())
    seen = dict.fromkeys(range(4), "")
    for word, number in zip(words, captions.picture_mask[0].tolist(), strict=True):
        seen[number] += f"{word} "
    around = "<fake_token_around_image>"
    assert seen[1] == f"<image> {around} a photo of two cats </s> "
    assert seen[2] == f"<image> {around} what is two </s> "
    assert seen[3] == f"<image> {around} what is a red dog </s> "
    labels = captions.labels[0]
    assert tokenizer.decode(labels[labels != IGNORED]) == "a red dog </s>"


def test_a_text_that_marks_a_picture_is_a_broken_sample(flamingo: Flamingo) -> None:
    for text in ("two <image> cats", "two cats</s>"):
        wrong = replace(sample(0), shots=(replace(sample(1), text=text),))
        with pytest.raises(DataError, match="marks a picture or the end of a text"):
            flamingo.texts.check(wrong)


def entries(folder: Path, count: int = 6) -> list[Entry]:
    """Two captions of each picture."""
    return [
        Entry(f"{number}{copy}", str(number), FilePicture(folder / f"{number}.png"), f"caption {number} {copy}")
        for number in range(count)
        for copy in "ab"
    ]


def source(folder: Path, shots: int, count: int = 6, broken: int = 0) -> ListSource:
    config = DataConfig(kind="folder", path="x", shots=shots)
    return ListSource(entries(folder, count), BrokenSamples("x", broken), "x", config, 4)


def test_examples_are_of_other_pictures_and_the_same_after_a_resume(tmp_path: Path) -> None:
    stream = source(tmp_path, 3)
    shown = iter(stream)
    first = [next(shown) for _ in range(30)]
    drawn = set()
    for each in first:
        pictures = [shot.image_id for shot in each.pictures]
        assert len(set(pictures)) == 4
        assert {shot.prompt for shot in each.shots} == {each.prompt}
        drawn |= {shot.sample_id for shot in each.shots}
    assert len(drawn) == 12
    state = stream.state_dict()
    following = [(each.sample_id, [shot.sample_id for shot in each.shots]) for each in (next(shown) for _ in range(5))]
    again = source(tmp_path, 3)
    again.load_state_dict(state)
    resumed = iter(again)
    assert following == [
        (each.sample_id, [shot.sample_id for shot in each.shots]) for each in (next(resumed) for _ in range(5))
    ]
    # Examples change nothing else.
    plain = iter(source(tmp_path, 0))
    parts = [(each.sample_id, each.text, each.prompt) for each in first]
    assert parts == [(each.sample_id, each.text, each.prompt) for each in (next(plain) for _ in range(30))]
    message = "expected more than 6 pictures to draw 6 few-shot examples from, got 6; lower shots"
    with pytest.raises(DataError, match=message):
        source(tmp_path, 6)


def test_a_sample_whose_example_is_broken_is_replaced(flamingo: Flamingo, tmp_path: Path) -> None:
    for number in range(6):
        Image.fromarray(np.full((20, 20, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"")
    stream = source(tmp_path, 2, broken=100)
    loader = Loader(stream, 3, flamingo.encoder, flamingo.texts, Accelerator())
    for _ in range(6):
        batch = next(loader)
        assert batch.pictures == 3
        assert len(batch.image_embeds) == 9
        assert not {"5a", "5b"} & set(batch.sample_ids)
    assert len(loader.broken) > 2


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ('bridge = "qformer"\n[data]\nkind = "folder"\npath = "x"\nshots = 2', r"\[data\] shots = 2 .* 'qformer'"),
        ('bridge = "flamingo"\n[data]\nshots = 2', r"does not work with kind = 'scenes'"),
        ('bridge = "flamingo"\n[data]\nkind = "shards"\npath = "x"\nshots = 2', r"does not work with kind = 'shards'"),
        (
            '[model]\ncheckpoint = "c"\n[validation]\nkind = "folder"\npath = "x"\nshots = 1',
            r"\[validation\] shots = 1",
        ),
    ],
)
def test_what_has_no_examples_is_refused_by_name(recipe: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(recipe)


def test_a_flamingo_trains_with_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "draw_curve", lambda lines, path: False)
    draw_idefics(tmp_path / "flamingo", 0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(draw_pictures(4)):
        picture.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(TEXTS[number][1])
    path = tmp_path / "recipe.toml"
    path.write_text(
        'bridge = "flamingo"\nweights_dtype = "float32"\n[model]\ncheckpoint = "flamingo"\n'
        '[data]\nkind = "folder"\npath = "pictures"\nshots = 2\n[stage2]\nsteps = 3\nbatch_size = 2\nwarmup_steps = 1\n'
        "[loop]\ncache_features = true\n"
    )
    train("stage2", path, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    before, after = (load_checkpoint(tmp_path / name).state_dict() for name in ("flamingo", "out"))
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"bridge", "language"}
