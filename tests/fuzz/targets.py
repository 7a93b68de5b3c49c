"""The readers that are fuzzed: seeds, mutation, function and allowed errors of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.errors import Blip2EdgeError
from tests.fuzz import mutations
from tests.fuzz.corpus import ANSWERS, CAPTIONS, CHAT, OPTIMIZED_GRAPH, QUESTIONS, RECIPE, Corpus
from tests.fuzz.mutations import Mutate

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        seeds: Valid files.
        mutate: Changes a file.
        prepare: Makes the function that reads a file, in a folder of its own. It runs once in each process.
        share: Share of the inputs, relative to the other readers.
        seconds: Longest time for one input.
        errors: Exceptions that the reader may raise.
        refuses: Whether the reader refuses broken files; False if it ignores them.
        packages: Modules without which the target is skipped.
    """

    seeds: Callable[[Corpus], list[bytes]]
    mutate: Mutate
    prepare: Callable[[Corpus, Path], Read]
    share: float = 1.0
    seconds: float = 2.0
    errors: tuple[type[Exception], ...] = (Blip2EdgeError,)
    refuses: bool = True
    packages: tuple[str, ...] = ()


def _file(name: str) -> Callable[[Corpus], list[bytes]]:
    """A file of the bundle, or of the checkpoint."""
    return lambda corpus: [
        ((corpus.bundle if (corpus.bundle / name).is_file() else corpus.checkpoint) / name).read_bytes()
    ]


def _json(*documents: Any) -> Callable[[Corpus], list[bytes]]:
    return lambda corpus: [json.dumps(document).encode() for document in documents]


def _at(path: Path, read: Callable[[], Any]) -> Read:
    """Writes the input to ``path`` and calls ``read``."""

    def call(content: bytes) -> None:
        path.write_bytes(content)
        read()

    return call


def manifest(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.bundle.manifest import read_manifest
    from blip2edge.cli import inspect
    from blip2edge.runtime.decoding.options import GenerationOptions
    from blip2edge.runtime.images.preprocess import Preprocessing

    def read() -> None:
        found = read_manifest(folder)
        json.dumps(found.to_json())
        inspect._head(found)
        inspect._files(found)
        for name, graph in found.graphs.items():
            inspect._graph(name, graph, found)
            graph.spec.axes()
        Preprocessing.from_json(found.preprocessing)
        known = {key: value for key, value in found.generation.items() if key in GenerationOptions.__dataclass_fields__}
        GenerationOptions(**known)

    return _at(folder / "bundle.json", read)


def captioner(corpus: Corpus, folder: Path) -> Read:
    """A whole caption by a bundle whose manifest is changed, and whose files are not."""
    from blip2edge.runtime.captioning.captioner import Captioner

    bundle = Path(shutil.copytree(corpus.bundle, folder / "bundle"))

    def read() -> None:
        with Captioner.load(bundle, backend="cpu", threads=1) as found:
            found.caption(corpus.pictures[0], prompt="a photo", max_new_tokens=2)

    return _at(bundle / "bundle.json", read)


def optimized(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.runtime.backends.optimized_copy import read_copy

    bundle = Bundle.open(shutil.copytree(corpus.bundle, folder / "bundle"))
    copy = folder / "bundle" / "optimized" / "cpu"
    copy.mkdir(parents=True)
    (copy / "bridge.onnx").write_bytes(OPTIMIZED_GRAPH)
    return _at(copy / "optimized.json", lambda: read_copy(bundle, "cpu"))


def engines(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.runtime.backends.engine_files import EngineSet, Fingerprint, check_fingerprint

    here = Fingerprint("tensorrt", "10.4.0", ("sm87",), "Orin", 8, 8, "12.6", "x86_64", "0" * 64)

    def read() -> None:
        found = EngineSet.read(folder)
        found.write()
        check_fingerprint(dict(found.fingerprint), here, folder, " ".join(found.rebuild))

    return _at(folder / "engine.json", read)


def stamps(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.bundle.bundle import Bundle

    bundle = Path(shutil.copytree(corpus.bundle, folder / "bundle"))
    return _at(bundle / ".verified.json", lambda: Bundle.open(bundle))


def token_table(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.bundle.token_table import TokenTable

    def read() -> None:
        table = TokenTable(folder / "t.safetensors", "embed_tokens", "float32")
        table.rows([0, table.num_rows - 1])

    return _at(folder / "t.safetensors", read)


def quantized_tables(corpus: Corpus) -> list[bytes]:
    import tempfile

    import numpy as np

    from blip2edge.bundle.safetensors_file import StoredTensor, write_safetensors

    found = [(corpus.bundle / "embed_tokens.safetensors").read_bytes()]
    with tempfile.TemporaryDirectory() as folder:
        for layout, shape, scales in (("rows", (10, 8), (10, 2)), ("columns", (8, 10), (2, 10))):
            path = Path(folder) / layout
            tensors = {"embed_tokens": StoredTensor("I8", shape), "embed_tokens.scale": StoredTensor("F32", scales)}
            pieces: list[np.ndarray[Any, Any]] = [np.ones(shape, np.int8), np.ones(scales, np.float32)]
            write_safetensors(path, tensors, pieces, {"bits": "8", "block": "4", "layout": layout})
            found.append(path.read_bytes())
    return found


def weights(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.model.checkpoint.stored.tensors import TensorFiles

    def read() -> None:
        files = TensorFiles(folder)
        try:
            for name in files.shapes:
                files.read([name]).float().sum()
        finally:
            files.close()

    return _at(folder / "model.safetensors", read)


def weight_index(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.model.checkpoint.stored.tensors import TensorFiles

    shutil.copy(corpus.checkpoint / "model.safetensors", folder / "model-1.safetensors")
    return _at(folder / "model.safetensors.index.json", lambda: TensorFiles(folder).close())


def config(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.model.checkpoint.directory import Checkpoint
    from blip2edge.model.families.registry import write_config

    shutil.copy(corpus.checkpoint / "model.safetensors", folder)

    def read() -> None:
        found = Checkpoint(folder)
        write_config(found.config)
        found.files.close()

    return _at(folder / "config.json", read)


def processor(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.model.checkpoint.image_processor import load_preprocessing

    return _at(folder / "preprocessor_config.json", lambda: load_preprocessing(folder))


def generation(corpus: Corpus, folder: Path) -> Read:
    from dataclasses import replace

    from blip2edge.model.checkpoint.generation import read_generation
    from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
    from blip2edge.model.config import CaptionerConfig
    from blip2edge.model.families.registry import read_config

    found = read_config(read_checkpoint_json(corpus.checkpoint / "config.json"))
    assert isinstance(found, CaptionerConfig)
    follows = replace(found, family="llava")  # a family that follows the file
    return _at(folder / "generation_config.json", lambda: read_generation(folder, follows))


def pickles(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.model.checkpoint.stored.pickled import read_pickled

    return _at(folder / "m.pth", lambda: read_pickled(folder / "m.pth"))


def tokenizer(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.runtime.text.tokenizer import Tokenizer

    def read() -> None:
        found = Tokenizer.from_file(folder / "tokenizer.json")
        found.decode(found.encode("a photo of two cats? é\n")[:50])

    return _at(folder / "tokenizer.json", read)


def captions(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.training.data.coco import read_captions

    for name in ("a.png", "b.png"):
        (folder / name).touch()
    return _at(folder / "captions.json", lambda: read_captions(folder / "captions.json", None, 100))


def questions(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.training.data.coco import read_vqa

    (folder / "a.png").touch()
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    path = folder / "questions.json"
    return _at(path, lambda: read_vqa(path, folder / "answers.json", None, 100))


def answers(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.training.data.coco import read_vqa

    (folder / "a.png").touch()
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    path = folder / "answers.json"
    return _at(path, lambda: read_vqa(folder / "questions.json", path, None, 100))


def texts(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.training.data.folder import read_folder

    (folder / "a.png").touch()
    return _at(folder / "a.txt", lambda: read_folder(folder, 10))


def recipe(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.training.config import config_hash, load_config

    return _at(folder / "r.toml", lambda: config_hash(load_config(folder / "r.toml")))


def shards(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.calibration.pictures import choose_pictures
    from blip2edge.errors import ImageError
    from blip2edge.training.data.entries import BrokenSamples
    from blip2edge.training.data.shards import read_shard

    path = folder / "s.tar"

    def read() -> None:
        for entry in read_shard(path, BrokenSamples("s", 10_000)):
            try:
                entry.picture.open()
            except ImageError:
                continue
        choose_pictures(path, 4)

    return _at(path, read)


def observations(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.calibration.activations.cache import load_observations

    def read() -> None:
        for observation in (load_observations(folder / "o.npz", ["norm"]) or {}).values():
            observation.sample()

    return _at(folder / "o.npz", read)


def features(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.training.loading.features import FeatureCache

    (folder / "a.rows").write_bytes(bytes(3 * 2 * 4 * 4))

    def read() -> None:
        cache = FeatureCache(folder, (2, 4), "float32")
        cache.read(list(cache._places)[:2])
        cache.close()

    return _at(folder / "a.index.jsonl", read)


def snapshot(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.training.loop.snapshots import Snapshots

    path = folder / "step-000000001"
    path.mkdir()
    (path / "state.json").write_text('{"phase": 1}')
    return _at(path / "state.safetensors", lambda: Snapshots(folder).newest())


def graph(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.graph_files import load_graph

    def read() -> None:
        model = load_graph(folder / "model.onnx")
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.numpy()

    return _at(folder / "model.onnx", read)


def session(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession

    return _at(folder / "model.onnx", lambda: OnnxRuntimeSession(folder / "model.onnx", 1).close())


def pictures(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.runtime.images.preprocess import Preprocessing, load_image

    preprocessing = Preprocessing(size={"height": 32, "width": 32})

    def read(content: bytes) -> None:
        preprocessing(load_image(content))

    return read


def video(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.runtime.images.preprocess import load_image
    from blip2edge.runtime.images.video import load_frames

    def read() -> None:
        for frame in load_frames(folder / "v.mp4", 3):
            load_image(frame)

    return _at(folder / "v.mp4", read)


def chat(corpus: Corpus, folder: Path) -> Read:
    from blip2edge.bundle.manifest import read_manifest
    from blip2edge.runtime.serving.openai_api import read_request

    prompt = read_manifest(corpus.bundle).prompt

    def read(content: bytes) -> None:
        read_request(content, prompt)

    return read


def chats(corpus: Corpus) -> list[bytes]:
    import base64

    url = "data:image/png;base64," + base64.b64encode(corpus.pictures[0][:200]).decode()
    return [json.dumps(CHAT).replace('"url": ""', f'"url": "{url}"').encode()]


BOUNDARY = b"b2e"


def forms(corpus: Corpus) -> list[bytes]:
    def part(name: str, body: bytes, file: str = "") -> bytes:
        return (
            b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="' + name.encode() + b'"'
            + (f'; filename="{file}"'.encode() if file else b"") + b"\r\n\r\n" + body + b"\r\n"
        )  # fmt: skip

    picture = corpus.pictures[0][:300]
    return [part("file", picture, "a.png") + part("prompt", b"a photo") + part("max_new_tokens", b"5") + b"--b2e--\r\n"]


def form(corpus: Corpus, folder: Path) -> Read:
    from starlette.datastructures import Headers, QueryParams

    from blip2edge.runtime.serving.picture_forms import read_caption_request

    headers = Headers({"content-type": "multipart/form-data; boundary=b2e"})
    return lambda content: read_caption_request(content, headers, QueryParams("seed=3"), "prompt")


def caption_json(corpus: Corpus, folder: Path) -> Read:
    from starlette.datastructures import Headers, QueryParams

    from blip2edge.runtime.serving.picture_forms import read_caption_request

    headers = Headers({"content-type": "application/json"})
    return lambda content: read_caption_request(content, headers, QueryParams(""), "question")


TARGETS: dict[str, Target] = {
    "bundle.json": Target(_file("bundle.json"), mutations.of_json, manifest, share=4),
    "captioner": Target(
        _file("bundle.json"), mutations.of_json, captioner, seconds=20, packages=("onnxruntime",), share=0.2
    ),
    "optimized.json": Target(lambda corpus: [corpus.optimized], mutations.of_json, optimized, share=4),
    "engine.json": Target(lambda corpus: [corpus.engines], mutations.of_json, engines, share=7),
    ".verified.json": Target(
        lambda corpus: [json.dumps({"bridge.onnx": [1, 2, 3, 4, 5, "0" * 64]}).encode()],
        mutations.of_json,
        stamps,
        share=1,
        refuses=False,
    ),
    "token table": Target(quantized_tables, mutations.of_safetensors, token_table, share=11),
    "safetensors": Target(
        lambda corpus: [(corpus.bundle / "embed_tokens.safetensors").read_bytes()],
        mutations.of_safetensors,
        weights,
        packages=("torch",),
        share=3,
    ),
    "safetensors index": Target(
        _json({"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}),
        mutations.of_json,
        weight_index,
        packages=("torch",),
        share=3,
    ),
    "config.json": Target(_file("config.json"), mutations.of_json, config, seconds=20, packages=("torch",), share=0.2),
    "preprocessor_config.json": Target(
        _json(
            {
                "image_processor_type": "BlipImageProcessor",
                "size": {"height": 384, "width": 384},
                "do_resize": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "rescale_factor": 0.00392,
                "resample": 3,
            },
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": 224,
                "crop_size": [224, 224],
                "do_center_crop": True,
            },
        ),
        mutations.of_json,
        processor,
        packages=("torch",),
        share=9,
    ),
    "generation_config.json": Target(
        _json(
            {
                "eos_token_id": [2],
                "num_beams": 3,
                "max_new_tokens": 20,
                "bad_words_ids": [[1, 3]],
                "length_penalty": 0.5,
            },
            {"eos_token_id": 2, "do_sample": True, "temperature": 0.5, "top_k": 5, "suppress_tokens": [3]},
        ),
        mutations.of_json,
        generation,
        packages=("torch",),
        share=6,
    ),
    ".pth": Target(lambda corpus: corpus.pickles, mutations.of_zip, pickles, packages=("torch",), share=0.3),
    "tokenizer.json": Target(_file("tokenizer.json"), mutations.of_json, tokenizer, share=1.5),
    "COCO captions": Target(_json(CAPTIONS), mutations.of_json, captions, packages=("torch",), share=8),
    "VQA questions": Target(_json(QUESTIONS), mutations.of_json, questions, packages=("torch",), share=6),
    "VQA answers": Target(_json(ANSWERS), mutations.of_json, answers, packages=("torch",), share=5),
    "caption text": Target(
        lambda corpus: ["a dog\n\ufeffé\r\n two\u2028cats\n".encode()],
        mutations.of_text,
        texts,
        packages=("torch",),
        share=2,
    ),
    "recipe": Target(lambda corpus: [RECIPE], mutations.of_text, recipe, packages=("torch",), share=5),
    "tar shard": Target(
        lambda corpus: corpus.shards, mutations.of_tar, shards, seconds=10, packages=("torch",), share=1
    ),
    "calibration cache": Target(lambda corpus: [corpus.observations], mutations.of_hashed_zip, observations, share=0.2),
    "feature index": Target(
        lambda corpus: [b'["a", "b"]\n["c"]\n'], mutations.of_text, features, packages=("torch", "accelerate"), share=3
    ),
    "snapshot": Target(
        lambda corpus: [(corpus.bundle / "embed_tokens.safetensors").read_bytes()],
        mutations.of_safetensors,
        snapshot,
        packages=("torch",),
        share=3,
    ),
    "ONNX graph": Target(
        lambda corpus: corpus.graphs, mutations.of_onnx, graph, packages=("onnx", "onnx_ir"), share=1.2
    ),
    "ONNX Runtime session": Target(
        lambda corpus: corpus.graphs,
        mutations.of_onnx,
        session,
        seconds=10,
        packages=("onnx", "onnxruntime"),
        share=0.2,
    ),
    "picture": Target(lambda corpus: corpus.pictures, mutations.of_png, pictures, seconds=10, share=1.2),
    "video": Target(lambda corpus: corpus.video, mutations.of_bytes, video, seconds=20, packages=("av",), share=0.2),
    "chat request": Target(chats, mutations.of_json, chat, packages=("starlette",), share=8),
    "form request": Target(forms, mutations.of_bytes, form, packages=("starlette", "python_multipart"), share=4),
    "JSON request": Target(
        _json(
            {"image": ["data:image/png;base64,iVBORw0KGgo="], "question": "what?", "max_new_tokens": 3, "stop": ["x"]}
        ),
        mutations.of_json,
        caption_json,
        packages=("starlette",),
        share=10,
    ),
}
"""The readers of foreign bytes, by name."""
