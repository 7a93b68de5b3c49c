"""The kinds of checkpoints of :mod:`tests.side_file_draws`, and transformers' answers for each.

Every family of the registry has a kind. LAVIS files have none: they have no files next to the weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from transformers import AutoProcessor

from blip2edge.bundle.bundle import Bundle
from blip2edge.model.checkpoint.directory import load_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher
from tests import drawing
from tests.families import drawing_blip, drawing_idefics, drawing_instruct, drawing_llama, test_minigpt4, test_pool
from tests.families import test_t5 as drawing_t5

NEW_TOKENS = 8
TIE = 1e-4  # of the range of a step's scores; float32 gives differences of 1e-6 to 1e-5
PICTURES = [picture.convert("RGB") for picture in drawing_llama.pictures(1)]
TORCHVISION = transformers.utils.import_utils.is_torchvision_available()
Answers = list[list[float]]
Answer = Callable[[Any], list[float]]
"""A picture to transformers' ids, or scores."""


@contextmanager
def recorded_scores() -> Iterator[list[torch.Tensor]]:
    """Records the scores ``[B, V]`` of each step of transformers' ``generate``, after all of its processors."""
    steps: list[torch.Tensor] = []
    mixin: Any = transformers.GenerationMixin
    original = mixin._get_logits_processor

    def record(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps.append(scores.detach().clone())
        return scores

    def with_record(*args: Any, **kwargs: Any) -> Any:
        processors = original(*args, **kwargs)
        processors.append(record)
        return processors

    mixin._get_logits_processor = with_record
    try:
        yield steps
    finally:
        mixin._get_logits_processor = original


def tied(directory: Path, kind: Kind, picture: int, found: list[float]) -> bool:
    """Whether the ids for a picture differ from transformers' by a tie of floating-point numbers.

    Compared is the first id that differs; the later ones follow from it. It is a tie if the scores of the two
    candidates differ by less than :data:`TIE` of the range of all scores. Searches with beams have no ties here.
    """
    with torch.no_grad(), recorded_scores() as steps:
        wanted = kind.answer(directory, kind)(kind.pictures[picture])
    place = next((at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    step = None if place is None else place - len(wanted) + len(steps)
    if place is None or step is None or not 0 <= step < len(steps) or len(steps[step]) != 1:
        return False
    scores = steps[step][0]
    if int(scores.argmax()) != wanted[place]:
        return False
    finite = scores[scores.isfinite()]
    gap = scores[int(wanted[place])] - scores[int(found[place])]
    return bool(gap < TIE * (finite.max() - finite.min()))


def load_theirs(directory: Path) -> Any:
    """transformers' model of a directory."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()


def from_auto(directory: Path, kind: Kind) -> Answer:
    """Answers with the classes that transformers' Auto classes choose."""
    model = load_theirs(directory)
    processor: Any = AutoProcessor.from_pretrained(directory)
    if not hasattr(model, "generate"):
        return lambda picture: _scores(model, processor, picture, kind)
    return lambda picture: _ids(model, _inputs(model, processor, picture, kind), kind)


def _inputs(model: Any, processor: Any, picture: Any, kind: Kind) -> Any:
    if "Idefics" in type(model).__name__:
        return processor(text=[[picture, kind.prompt]], return_tensors="pt")
    if kind.chat and processor.chat_template is not None:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": kind.prompt}]
        messages = [{"role": "user", "content": content}]
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    return processor(images=picture, text=kind.text or kind.prompt, return_tensors="pt")


def _ids(model: Any, inputs: Any, kind: Kind) -> list[float]:
    found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = getattr(found, "sequences", found)[0].tolist()
    length = inputs["input_ids"].shape[1]
    return list(ids[{"all": length, "but one": length - 1, "none": 0}[kind.prompt_ids] :])


def _scores(model: Any, processor: Any, picture: Any, kind: Kind) -> list[float]:
    inputs = processor(images=picture, text=kind.prompt, return_tensors="pt")
    if "CLIP" in type(model).__name__:
        out = model(**inputs)
        return [float(out.image_embeds @ out.text_embeds.T)]
    if type(model).__name__.startswith("Blip2"):
        match = model(**inputs, use_image_text_matching_head=True).logits_per_image
        contrast = model(**inputs, use_image_text_matching_head=False).logits_per_image
    else:
        match = model(**inputs, use_itm_head=True).itm_score
        contrast = model(**inputs, use_itm_head=False).itm_score
    return [float(match.softmax(dim=1)[0, 1]), float(contrast)]


def from_video(directory: Path, kind: Kind) -> Answer:
    """InstructBlipVideo: transformers' processor where torchvision can be imported, else what stands in for it."""
    model = load_theirs(directory)
    load: Any = AutoProcessor.from_pretrained if TORCHVISION else drawing_instruct.VideoOracle
    processor = load(directory)
    return lambda clip: _ids(model, processor(images=clip, text=kind.prompt, return_tensors="pt"), kind)


def from_minigpt4(directory: Path, kind: Kind) -> Answer:
    """The published prompt around the parts of transformers' BLIP-2, which has the same tensors and keys."""
    with tempfile.TemporaryDirectory() as folder:
        copy = _as_blip2(directory, Path(folder))
        model, processor = load_theirs(copy), AutoProcessor.from_pretrained(copy)
    reference = test_minigpt4.reference_of(model, processor)
    return lambda picture: list(reference(picture, kind.prompt, max_new_tokens=NEW_TOKENS, do_sample=False))


def from_pool(directory: Path, kind: Kind) -> Answer:
    """torch's attention between the vision encoder and the language model of transformers' BLIP-2."""
    unused = {
        "qformer_config": transformers.Blip2QFormerConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        ).to_dict(),
        "num_query_tokens": drawing.Variant().queries,
    }
    bridge: Any = load_checkpoint(directory).bridge
    with tempfile.TemporaryDirectory() as folder:
        copy = _as_blip2(directory, Path(folder), **unused)
        model, processor = load_theirs(copy), AutoProcessor.from_pretrained(copy)
    pool = test_pool.Reference(bridge)

    def answer(picture: Any) -> list[float]:
        pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
        text = processor.tokenizer(kind.prompt, return_tensors="pt")["input_ids"]
        visual = pool(model.vision_model(pixels).last_hidden_state)
        language = model.language_model
        ids = torch.cat([torch.full(visual.shape[:2], model.config.image_token_index), text], dim=1)
        embeds = torch.cat([visual, language.get_input_embeddings()(text)], dim=1)
        inputs = {"inputs_embeds": embeds, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return _ids(language, inputs, kind)

    return answer


def _as_blip2(directory: Path, folder: Path, **keys: Any) -> Path:
    """A copy of a checkpoint that transformers takes for a BLIP-2."""
    copy = shutil.copytree(directory, folder / "copy")
    values = json.loads((copy / "config.json").read_text()) | keys
    values |= {"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]}
    (copy / "config.json").write_text(json.dumps(values))
    return copy


def save_pool(directory: Path) -> None:
    """A checkpoint with an attention pool."""
    with tempfile.TemporaryDirectory() as folder:
        test_pool.save_pool(directory, drawing.save(Path(folder) / "drawn", seed=12))


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: how it is drawn, and what is asked.

    Attributes:
        save: Writes a checkpoint into a directory.
        prompt: Text of the request.
        text: Text that transformers' processor gets for it, where that differs and the checkpoint has no chat template.
        prompt_ids: How many ids of the prompt are at the start of transformers' ids: ``all``, ``but one`` or ``none``.
        answer: transformers' ids, or scores, of a directory for one picture.
        pictures: What is asked about.
        options: More options of the captioner.
        chat: Whether transformers' chat template makes the prompt.
    """

    save: Callable[[Path], Any]
    prompt: str = "a photo of"
    text: str = ""
    prompt_ids: str = "all"
    answer: Callable[[Path, Kind], Answer] = from_auto
    pictures: list[Any] = field(default_factory=lambda: PICTURES)
    options: dict[str, Any] = field(default_factory=dict)
    chat: bool = False


def theirs(directory: Path, kind: Kind) -> Answers:
    """transformers' ids, or scores, for each picture."""
    answer = kind.answer(directory, kind)
    with torch.no_grad():
        return [answer(picture) for picture in kind.pictures]


def ours(bundle: Path, kind: Kind) -> Answers:
    """The bundle's ids, or scores, for each picture."""
    if Bundle.open(bundle).manifest.prompt is None:
        with Matcher.load(bundle, threads=1) as matcher:
            found = [matcher.match(picture, kind.prompt) for picture in kind.pictures]
        return [[value for value in (one.probability, one.cosine) if value is not None] for one in found]
    with Captioner.load(bundle, threads=1) as captioner:
        options: Any = {"max_new_tokens": NEW_TOKENS, "temperature": 0, **kind.options}
        return [list(captioner.caption(picture, prompt=kind.prompt, **options).tokens) for picture in kind.pictures]


def clips() -> list[list[PIL.Image.Image]]:
    """Videos: noise in the size that the models take, flat colours, and noise that is resized.

    transformers' processor of videos resizes with torchvision, which rounds some values to the next of 256 grey
    levels. The weights here are so large that this changes ids. So the last video is for its stand-in only.
    """
    rng = np.random.default_rng(1)
    frames, size, other = drawing_instruct.FRAMES, (drawing_instruct.SIZE,) * 2, (40, 52)
    noise = [[rng.integers(0, 256, (*edges, 3), dtype=np.uint8) for _ in range(frames)] for edges in (size, other)]
    flat = [np.full((*other, 3), rng.integers(0, 256, 3), dtype=np.uint8) for _ in range(frames)]
    arrays = [noise[0], flat] if TORCHVISION else [noise[0], flat, noise[1]]
    return [[PIL.Image.fromarray(frame) for frame in clip] for clip in arrays]


ASKED = "what is it doing?"

KINDS: dict[str, Kind] = {
    "blip-2, opt": Kind(lambda path: drawing.save(path, seed=1)),
    "blip-2, llama": Kind(lambda path: drawing_llama.draw_blip2(path, 2)),
    "blip-2, t5": Kind(lambda path: drawing_t5.draw(13, path, **drawing_t5.KINDS[0]), prompt_ids="none"),
    "instructblip, t5": Kind(lambda path: drawing_instruct.draw_instructblip(path, 3, "t5"), ASKED, prompt_ids="none"),
    "instructblip, llama": Kind(lambda path: drawing_instruct.draw_instructblip(path, 4, "llama"), ASKED),
    "instructblipvideo, t5": Kind(
        lambda path: drawing_instruct.draw_instructblipvideo(path, 10, "t5"),
        ASKED,
        prompt_ids="none",
        answer=from_video,
        pictures=clips(),
    ),
    "instructblipvideo, llama": Kind(
        lambda path: drawing_instruct.draw_instructblipvideo(path, 11, "llama"),
        ASKED,
        answer=from_video,
        pictures=clips(),
    ),
    "blip": Kind(lambda path: drawing_blip.save_blip(path, "caption", 5), prompt_ids="but one"),
    "blip-vqa": Kind(lambda path: drawing_blip.save_blip(path, "vqa", 6), "what is it?", prompt_ids="none"),
    "minigpt4": Kind(
        lambda path: drawing_llama.draw_minigpt4(path, 14), "what is it ?", answer=from_minigpt4, options={"stop": ()}
    ),
    "pool": Kind(save_pool, answer=from_pool),
    "llava": Kind(
        lambda path: drawing_llama.draw_llava(path, 7),
        "what is it ?",
        "USER: <image>\nwhat is it ? ASSISTANT:",
        chat=True,
    ),
    "llava, qwen2": Kind(
        lambda path: drawing_llama.draw_llava(path, 15, "qwen2"),
        "what is it ?",
        "USER: <image>\nwhat is it ? ASSISTANT:",
        chat=True,
    ),
    "idefics": Kind(lambda path: drawing_idefics.draw_idefics(path, 8)),
    "blip-itm": Kind(lambda path: drawing_blip.save_blip(path, "retrieval", 9), "two red cats"),
    "blip-2-itm": Kind(lambda path: drawing_blip.save_blip2(path, 10), "two red cats"),
    "clip": Kind(lambda path: drawing_blip.save_clip(path, 11), "two red cats"),
}
