"""Valid files of every kind, made by code: the seeds that are mutated."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTIONS = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": "b", "file_name": "b.png"}],
    "annotations": [
        {"id": 7, "image_id": 1, "caption": "a dog"},
        {"id": 8, "image_id": "b", "caption": "two \u00e9 cats"},
    ],
}
QUESTIONS = {
    "questions": [{"question_id": 1, "image_id": 1, "question": "how many?"}],
    "images": [{"id": 1, "file_name": "a.png"}],
    "data_subtype": "val2014",
}
ANSWERS = {"annotations": [{"question_id": 1, "answers": [{"answer": "two"}, "2"], "answer_type": "number"}]}
RECIPE = b"""seed = 3
bridge = "qformer"
threads = 2

[data]
kind = "scenes"

[model]
num_query_tokens = 8
[model.vision]
hidden_size = 64

[stage2]
steps = 10
learning_rate = 1e-3
"""
CHAT = {
    "model": "m",
    "messages": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": ""}}],
        },
    ],
    "max_tokens": 5,
    "temperature": 0.5,
    "stop": ["\n"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "logit_bias": {},
}


@dataclass(frozen=True)
class Corpus:
    """The seeds.

    Attributes:
        checkpoint: A checkpoint directory.
        bundle: Its bundle.
    """

    checkpoint: Path
    bundle: Path

    @cached_property
    def picture(self) -> Image.Image:
        """A small picture with some structure."""
        values = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
        return Image.fromarray(values).resize((64, 48))

    def encoded(self, form: str, **options: Any) -> bytes:
        """The picture in a file of Pillow's format ``form``."""
        buffer = io.BytesIO()
        mode = options.pop("mode", "RGB")
        self.picture.convert(mode).save(buffer, form, **options)
        return buffer.getvalue()

    @cached_property
    def pictures(self) -> list[bytes]:
        """The picture in many formats."""
        exif = Image.Exif()
        exif[0x0112] = 6
        frames = [self.picture.rotate(angle) for angle in (90, 180)]
        animated: dict[str, Any] = {"save_all": True, "append_images": frames}
        forms: list[tuple[str, dict[str, Any]]] = [
            ("PNG", {}),
            ("PNG", {"mode": "P"}),
            ("PNG", {"mode": "LA"}),
            ("PNG", {"mode": "I;16"}),
            ("PNG", animated),
            ("JPEG", {"exif": exif}),
            ("JPEG", {"progressive": True, "icc_profile": b"x" * 200}),
            ("JPEG", {"mode": "CMYK"}),
            ("GIF", animated),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("TIFF", animated),
            ("WEBP", animated),
            ("WEBP", {"lossless": True}),
            ("BMP", {}),
            ("PPM", {}),
            ("ICO", {"sizes": [(16, 16), (32, 32)]}),
            ("TGA", {"compression": "tga_rle"}),
            ("JPEG2000", {}),
        ]
        return [self.encoded(form, **dict(options)) for form, options in forms if form in Image.SAVE or Image.init()]

    @cached_property
    def shards(self) -> list[bytes]:
        """Tar files in two formats, with captions and questions."""
        found = []
        fields = {"image_id": 3, "question": "how many?", "answers": ["two", {"answer": "2"}]}
        for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
                for name, body in (
                    ("0.png", self.pictures[0]),
                    ("0.txt", "a dog\ntwo dogs \u00e9\n".encode()),
                    ("1.jpg", self.pictures[5]),
                    ("1.json", json.dumps(fields).encode()),
                    ("\u00e9" * 80 + ".png" if form != tarfile.USTAR_FORMAT else "2.png", b"x"),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(body)
                    archive.addfile(info, io.BytesIO(body))
            found.append(buffer.getvalue())
        return found

    @cached_property
    def observations(self) -> bytes:
        """A calibration cache of one activation."""
        from blip2edge.calibration.activations.cache import save_observations
        from blip2edge.calibration.activations.observer import Observer

        observer = Observer(1, 0)
        observer.update(np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32))
        with tempfile.TemporaryDirectory() as folder:
            save_observations(Path(folder) / "one.npz", {"norm": observer.result()})
            return (Path(folder) / "one.npz").read_bytes()

    @cached_property
    def pickles(self) -> list[bytes]:
        """Files of torch.save, in the zip form and in the old one, with tensors and with other objects."""
        import argparse

        import torch

        tensors = {"model": {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.int64)}}
        found = []
        for content, options in (
            (tensors, {}),
            (tensors, {"_use_new_zipfile_serialization": False}),
            ({**tensors, "config": argparse.Namespace(a=1)}, {}),
        ):
            buffer = io.BytesIO()
            torch.save(content, buffer, **options)
            found.append(buffer.getvalue())
        return found

    @cached_property
    def video(self) -> list[bytes]:
        """Short films."""
        import av

        found = []
        for form, codec in (("mp4", "mpeg4"), ("avi", "mpeg4"), ("matroska", "mpeg4")):
            buffer = io.BytesIO()
            with av.open(buffer, "w", format=form) as container:
                stream: Any = container.add_stream(codec, rate=5)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for angle in range(0, 360, 60):
                    container.mux(stream.encode(av.VideoFrame.from_image(self.picture.rotate(angle))))
                container.mux(stream.encode())
            found.append(buffer.getvalue())
        return found

    @cached_property
    def graphs(self) -> list[bytes]:
        """Small ONNX graphs."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
        shape = numpy_helper.from_array(np.array([-1, 3], np.int64), "shape")
        typed = helper.make_tensor("bias", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Add", ["m", "bias"], ["s"]),
            helper.make_node("Reshape", ["s", "shape"], ["r"]),
            helper.make_node("Softmax", ["r"], ["y"], axis=-1),
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(2, np.float32), "c")),
        ]
        graph = helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
            [weight, shape, typed],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model)
        return [model.SerializeToString()]

    @cached_property
    def engines(self) -> bytes:
        """An ``engine.json``."""
        graph = json.loads((self.bundle / "bundle.json").read_text())["graphs"]["vision_encoder"]
        engine = {
            "file": "vision_encoder.engine", "sha256": "0" * 64, "size": 5, "precision": "fp16", "profiles": ["all"],
            "seconds": 1.5, "warnings": [], "asked": {"fp16": 3}, "landed": None, "cache": "",
            "inputs": graph["inputs"], "outputs": graph["outputs"],
        }  # fmt: skip
        mark = {
            "target": "tensorrt", "tensorrt": "10.3.0", "gpus": ["sm87"], "gpu": "Orin", "multiprocessors": 8,
            "memory_gib": 8, "driver": "12.6", "machine": "x86_64", "bundle_sha256": "0" * 64,
            "version_compatible": True, "hardware_compatible": True,
        }  # fmt: skip
        document = {"schema_version": 3, "fingerprint": mark, "rebuild": ["--sm", "87"], "capacity": 0}
        return json.dumps({**document, "engines": {"vision_encoder": engine}}).encode()

    @cached_property
    def optimized(self) -> bytes:
        """An ``optimized.json`` of the bundle."""
        from importlib.metadata import version

        parity = {
            "output": "y",
            "max_difference": 0.0,
            "relative": 0.0,
            "tolerance": 0.1,
            "cases": ["batch 1"],
            "sample": "",
        }
        graph = {
            "file": "bridge.onnx", "passes": ["fuse"], "one_by_one": False, "layout": True, "parity": [parity],
            "cosine": 1.0, "milliseconds": [2.0, 1.0],
        }  # fmt: skip
        bundle = hashlib.sha256((self.bundle / "bundle.json").read_bytes()).hexdigest()
        body = hashlib.sha256(b"\x08\x08").hexdigest()
        document = {
            "schema_version": 2, "backend": "cpu", "bundle_sha256": bundle, "graphs": {"bridge": graph},
            "left": {"decoder": "why"}, "files": {"bridge.onnx": {"sha256": body, "size": 2}},
            "versions": {"onnxruntime": version("onnxruntime")}, "machine": "any",
        }  # fmt: skip
        return json.dumps(document).encode()
