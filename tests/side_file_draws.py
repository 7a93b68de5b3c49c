"""Draws a key of a side file and a value for it, and compares transformers' answers with those of the export.

    python -m tests.side_file_draws --draws 1000 --seed 1

Each draw changes one key of one file next to the weights of a tiny checkpoint. The result is one of:

- ``equal``: exported, and the answers are those of transformers for the changed file;
- ``refused``: the export refuses the file (``unneeded`` if transformers' answers do not change);
- ``fails``: transformers cannot load or run the changed checkpoint, the export does not refuse it;
- ``different``: exported, and the answers differ, or an error that is not meant for users. There must be none.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoProcessor, GenerationConfig

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.integrity import FileRecord
from blip2edge.errors import Blip2EdgeError, PromptError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.export.side_files import SideFiles
from blip2edge.model.checkpoint.directory import Checkpoint
from blip2edge.model.checkpoint.side_keys import IMAGE_PROCESSOR
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher
from tests import drawing
from tests.families import drawing_blip, drawing_idefics, drawing_instruct, drawing_llama

NEW_TOKENS = 8
PICTURES = drawing_llama.pictures(1)
Answers = list[list[float]]


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: how it is drawn, and what is asked.

    Attributes:
        save: Writes a checkpoint into a directory.
        prompt: Text of the request.
        text: Text that transformers' processor gets for it, where that differs.
        prompt_ids: How many ids of the prompt are at the start of transformers' ids: ``all``, ``but one`` or ``none``.
    """

    save: Callable[[Path], Any]
    prompt: str = "a photo of"
    text: str = ""
    prompt_ids: str = "all"


KINDS: dict[str, Kind] = {
    "blip-2, opt": Kind(lambda path: drawing.save(path, seed=1)),
    "blip-2, llama": Kind(lambda path: drawing_llama.draw_blip2(path, 2)),
    "instructblip, t5": Kind(
        lambda path: drawing_instruct.draw_instructblip(path, 3, "t5"), "what is it doing?", prompt_ids="none"
    ),
    "instructblip, llama": Kind(lambda path: drawing_instruct.draw_instructblip(path, 4, "llama"), "what is it doing?"),
    "blip": Kind(lambda path: drawing_blip.save_blip(path, "caption", 5), prompt_ids="but one"),
    "blip-vqa": Kind(lambda path: drawing_blip.save_blip(path, "vqa", 6), "what is it?", prompt_ids="none"),
    "llava": Kind(
        lambda path: drawing_llama.draw_llava(path, 7), "what is it ?", "USER: <image>\nwhat is it ? ASSISTANT:"
    ),
    "idefics": Kind(lambda path: drawing_idefics.draw_idefics(path, 8)),
    "blip-itm": Kind(lambda path: drawing_blip.save_blip(path, "retrieval", 9), "two red cats"),
    "blip-2-itm": Kind(lambda path: drawing_blip.save_blip2(path, 10), "two red cats"),
    "clip": Kind(lambda path: drawing_blip.save_clip(path, 11), "two red cats"),
}


def theirs(directory: Path, kind: Kind) -> Answers:
    """transformers' ids, or scores, for each picture."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model: Any = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(directory)
    answers = []
    for picture in PICTURES:
        picture = picture.convert("RGB")
        if hasattr(model, "generate"):
            answers.append(_their_ids(model, processor, picture, kind))
        else:
            answers.append(_their_scores(model, processor, picture, kind))
    return answers


@torch.no_grad()
def _their_ids(model: Any, processor: Any, picture: Any, kind: Kind) -> list[float]:
    if "Idefics" in type(model).__name__:
        inputs = processor(text=[[picture, kind.prompt]], return_tensors="pt")
    else:
        inputs = processor(images=picture, text=kind.text or kind.prompt, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = getattr(found, "sequences", found)[0].tolist()
    length = inputs["input_ids"].shape[1]
    return list(ids[{"all": length, "but one": length - 1, "none": 0}[kind.prompt_ids] :])


@torch.no_grad()
def _their_scores(model: Any, processor: Any, picture: Any, kind: Kind) -> list[float]:
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


def ours(bundle: Path, kind: Kind) -> Answers:
    """The bundle's ids, or scores, for each picture."""
    pictures = [picture.convert("RGB") for picture in PICTURES]
    if Bundle.open(bundle).manifest.prompt is None:
        with Matcher.load(bundle, threads=1) as matcher:
            found = [matcher.match(picture, kind.prompt) for picture in pictures]
        return [[value for value in (one.probability, one.cosine) if value is not None] for one in found]
    with Captioner.load(bundle, threads=1) as captioner:
        options: Any = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
        return [list(captioner.caption(picture, prompt=kind.prompt, **options).tokens) for picture in pictures]


def same(one: Answers, other: Answers) -> bool:
    """Whether ids are equal, and scores are to 1e-4."""
    for a, b in zip(one, other, strict=True):
        if all(isinstance(value, int) for value in [*a, *b]):
            if a != b:
                return False
        elif len(a) != len(b) or max(abs(x - y) for x, y in zip(a, b, strict=True)) > 1e-4:
            return False
    return True


@dataclass
class Base:
    """An unchanged checkpoint, its bundle, and the answers of both."""

    kind: Kind
    directory: Path
    bundle: Path
    answers: Answers
    state: Any


@dataclass
class Draws:
    """The draws of a run.

    Attributes:
        root: Directory for checkpoints.
        seed: Of the draws.
        kinds: Keys of :data:`KINDS`.
    """

    root: Path
    seed: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)
    bases: dict[str, Base] = field(default_factory=dict)

    def base(self, name: str) -> Base:
        """The checkpoint of a kind; drawn and exported once."""
        if name not in self.bases:
            directory = self.root / name.replace(", ", "-")
            kind = KINDS[name]
            bundle = directory / "bundle"
            if not bundle.is_dir():
                kind.save(directory / "checkpoint")
                export_checkpoint(directory / "checkpoint", bundle, verify="sample")
            answers = theirs(directory / "checkpoint", kind)
            assert same(ours(bundle, kind), answers), name
            self.bases[name] = Base(kind, directory / "checkpoint", bundle, answers, state_of(directory / "checkpoint"))
        return self.bases[name]

    def run(self, count: int) -> Iterator[tuple[str, str]]:
        """Makes draws; each result with a description of the draw."""
        rng = random.Random(self.seed)
        for _ in range(count):
            name = rng.choice(self.kinds)
            base = self.base(name)
            with tempfile.TemporaryDirectory(dir=self.root) as folder:
                directory = Path(folder) / "checkpoint"
                shutil.copytree(base.directory, directory)
                file, section, key, value = change(directory, rng)
                told = f"{name}: {file} {section}{key} = {json.dumps(value)}"
                yield judge(base, directory), told


def state_of(directory: Path) -> Any:
    """All that the export takes from the files: equal states give equal bundles."""
    checkpoint = Checkpoint(directory)
    side = SideFiles.read(directory, checkpoint.config)
    sources = {name: checkpoint.map.sources(name) for name in checkpoint.shapes}
    checkpoint.files.close()
    return checkpoint.config, dataclasses.replace(side, warnings=()), sources


def judge(base: Base, directory: Path) -> str:
    """The result of a changed checkpoint."""
    try:
        wanted: Answers | None = theirs(directory, base.kind)
    except Exception:  # noqa: BLE001 - transformers raises all kinds
        wanted = None
    try:
        state = state_of(directory)
    except Blip2EdgeError as error:
        changed = wanted is None or not same(wanted, base.answers)
        return f"refused{'' if changed else ', unneeded'}: {error}"
    except Exception as error:  # noqa: BLE001 - a fault of the export
        return f"different: {type(error).__name__}: {error}"
    if wanted is None:
        return "fails"
    if state == base.state:
        found = base.answers
    else:
        bundle = directory.parent / "bundle"
        if state[0] == base.state[0] and state[2] == base.state[2]:
            copy_bundle(base.bundle, bundle, state[1])
        else:
            export_checkpoint(directory, bundle, verify="sample")
        try:
            found = ours(bundle, base.kind)
        except PromptError as error:  # the text of the request has become a special token
            return f"refused at run: {error}"
        except Blip2EdgeError as error:
            return f"different: {error}"
    if same(found, wanted):
        return "equal" if same(wanted, base.answers) else "equal, changed"
    return f"different: {found} instead of {wanted}, before {base.answers}"


def copy_bundle(source: Path, target: Path, side: SideFiles) -> None:
    """A bundle with other side files and the same graphs."""
    shutil.copytree(source, target)
    side.write(target)
    manifest = Bundle.open(source).manifest
    files = {name: FileRecord.of(target / name) for name in manifest.files}
    dataclasses.replace(
        manifest,
        preprocessing=side.preprocessing.to_json(),
        prompt=side.prompt,
        generation=side.generation,
        tokenizer=side.tokenizer_flags,
        files=files,
    ).write(target)


TOKENIZER_KEYS: dict[str, tuple[Any, ...]] = {
    "clean_up_tokenization_spaces": (True, False),
    "split_special_tokens": (True, False),
    "add_prefix_space": (True, False),
    "do_lower_case": (True, False),
    "strip_accents": (True, False),
    "tokenizer_class": ("BertTokenizer", "GPT2Tokenizer", "LlamaTokenizer", "T5Tokenizer", "PreTrainedTokenizerFast"),
    "eos_token": ("a", "dog", "</s>"),
    "bos_token": ("a", "<s>", "</s>"),
    "unk_token": ("<unk>", "a"),
    "pad_token": ("<pad>", "a"),
    "extra_special_tokens": (["dog"], {"image_token": "<image>"}, []),
    "additional_special_tokens": (["dog"], []),
    "add_bos_token": (True, False),
    "add_eos_token": (True, False),
    "legacy": (True, False),
    "model_max_length": (3, 512),
    "padding_side": ("left", "right"),
    "truncation_side": ("left", "right"),
    "use_default_system_prompt": (True,),
    "spaces_between_special_tokens": (True, False),
}

PROCESSOR_KEYS: dict[str, tuple[Any, ...]] = {
    "num_query_tokens": (4, 5, 9),
    "patch_size": (7, 8),
    "vision_feature_select_strategy": ("default", "full"),
    "num_additional_image_tokens": (0, 1, 2),
    "image_token": ("<image>", "a"),
    "image_size": (24, 32),
    "add_end_of_utterance_token": (True, False),
    "favourite": (1,),
}

IMAGE_VALUES: dict[str, tuple[Any, ...]] = {
    "image_processor_type": (
        "BlipImageProcessor",
        "BlipImageProcessorFast",
        "CLIPImageProcessor",
        "SiglipImageProcessor",
        "ViTImageProcessor",
        "BitImageProcessor",
        "LlavaImageProcessor",
        "IdeficsImageProcessor",
        "ConvNextImageProcessor",
    ),
    "size": (24, 32, {"height": 32, "width": 32}, {"height": 24, "width": 24}, {"shortest_edge": 32}, [32, 32]),
    "crop_size": (24, 32, {"height": 32, "width": 32}, {"height": 24, "width": 24}),
    "resample": (0, 1, 2, 3, 4, 5),
    "rescale_factor": (1 / 255, 1 / 127.5, 0.01),
    "image_mean": ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], 0.5),
    "image_std": ([0.5, 0.5, 0.5], [0.9, 0.8, 0.7], 0.5),
    "image_size": (24, 32),
    "data_format": ("channels_first", "channels_last"),
}

GENERATION_VALUES: dict[str, tuple[Any, ...]] = {
    "eos_token_id": (2, 5, [7, 9], list(range(20, 60))),
    "num_beams": (1, 3),
    "repetition_penalty": (1.0, 1.8),
    "no_repeat_ngram_size": (0, 1, 2),
    "suppress_tokens": ([], list(range(30, 80))),
    "begin_suppress_tokens": (list(range(30, 80)),),
    "bad_words_ids": ([[40], [41]], [[index] for index in range(30, 80)]),
    "forced_bos_token_id": (5,),
    "forced_eos_token_id": (5, 2),
    "sequence_bias": ([[[index], -20.0] for index in range(30, 80)],),
    "encoder_repetition_penalty": (1.0, 2.0),
    "encoder_no_repeat_ngram_size": (0, 1),
    "exponential_decay_length_penalty": ([2, 3.0],),
    "length_penalty": (1.0, -2.0, 3.0),
    "early_stopping": (True, False, "never"),
    "min_new_tokens": (0, 4),
    "min_length": (0, 30),
    "max_length": (5, 20, 4096),
    "temperature": (0.3, 1.0),
    "top_k": (1, 50),
    "top_p": (0.5, 1.0),
    "do_sample": (True, False),
    "guidance_scale": (1.0, 2.0),
    "num_beam_groups": (1, 3),
    "num_return_sequences": (1, 2),
    "renormalize_logits": (True,),
    "cache_implementation": ("dynamic", "static"),
    "favourite": (1,),
}

OTHER_VALUES: tuple[Any, ...] = (True, False, None, 0, 1, 2, 3, 0.5, 1.5, "relu", "gelu")
"""Values of a key without a list of its own."""


def change(directory: Path, rng: random.Random) -> tuple[str, str, str, Any]:
    """Changes one key of one file in place; the file, the section in it, the key and the value."""
    files = ["config.json", "generation_config.json", "processor", "tokenizer_config.json", "image processor"]
    file = rng.choice([name for name in files if name != "generation_config.json" or (directory / name).is_file()])
    section = ""
    if file == "processor":
        return _set(directory / "processor_config.json", "", *_pick(PROCESSOR_KEYS, rng))
    if file == "tokenizer_config.json":
        where = rng.choice(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
        if where == "added_tokens.json":
            return _set(directory / where, "", "dog", rng.choice([7, 500]))
        keys = {
            key: values
            for key, values in TOKENIZER_KEYS.items()
            if where != "special_tokens_map.json" or "token" in key
        }
        return _set(directory / where, "", *_pick(keys, rng))
    if file == "generation_config.json":
        known = {key: GENERATION_VALUES.get(key, OTHER_VALUES) for key in GenerationConfig().to_dict()}
        return _set(directory / file, "", *_pick(known | GENERATION_VALUES, rng))
    if file == "image processor":
        known = {key: IMAGE_VALUES.get(key, (True, False, None)) for key in IMAGE_PROCESSOR.honoured}
        extra = {
            "do_pad": (True, False),
            "do_convert_rgb": (True, False),
            "crop_pct": (0.9,),
            "image_num_channels": (1, 3),
        }
        where = rng.choice(["processor_config.json", "preprocessor_config.json"])
        key, value = _pick(known | extra, rng)
        if where == "preprocessor_config.json":
            path = directory / where
            own = json.loads((directory / "processor_config.json").read_text()).get("image_processor", {})
            path.write_text(json.dumps(own))
            return _set(path, "", key, value)
        return _set(directory / where, "image_processor", key, value)
    values = json.loads((directory / file).read_text())
    section = rng.choice(["", *(key for key, inner in values.items() if isinstance(inner, dict))])
    part = values[section] if section else values
    key = rng.choice(sorted(key for key, value in part.items() if not isinstance(value, dict)))
    return _set(directory / file, section, key, rng.choice(OTHER_VALUES))


def _pick(pool: dict[str, tuple[Any, ...]], rng: random.Random) -> tuple[str, Any]:
    key = rng.choice(sorted(pool))
    return key, rng.choice(pool[key])


def _set(path: Path, section: str, key: str, value: Any) -> tuple[str, str, str, Any]:
    values = json.loads(path.read_text()) if path.is_file() else {}
    part = values.setdefault(section, {}) if section else values
    part[key] = value
    path.write_text(json.dumps(values))
    return path.name, f"{section}." if section else "", key, value


def main() -> None:
    """Prints each draw and the number of each result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--root", type=Path, help="keeps the unchanged checkpoints and bundles for another run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    if options.root is not None:
        options.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for result, told in Draws(options.root or Path(folder), options.seed, tuple(options.kinds)).run(options.draws):
            counts[result.split(":")[0]] += 1
            print(f"{told} -> {result}", flush=True)
    print(dict(counts))
    raise SystemExit(counts["different"] > 0)


if __name__ == "__main__":
    main()
