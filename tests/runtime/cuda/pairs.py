"""The same decoder in kernels and as the portable graph, with the bundles that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.safetensors_file import SafetensorsFile
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import TokenTable
from blip2edge.calibration.pipeline import calibrate
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.graph_files import load_graph
from blip2edge.optimization.cuda_kernels.layout import layout_of_graph
from blip2edge.runtime.cuda.decoding.decoder import KernelDecoder
from blip2edge.runtime.cuda.decoding.session import KernelSession
from blip2edge.runtime.cuda.device.driver import DriverDevice
from blip2edge.runtime.cuda.device.interface import KernelDevice
from blip2edge.runtime.cuda.plan import needed_kernels
from blip2edge.runtime.cuda.token_table import load_table, table_format
from blip2edge.runtime.cuda.weights import load_weights, planned_weights
from blip2edge.runtime.decoding.kv.growing import GrowingDecoder
from tests import drawing
from tests.families import drawing_llama
from tests.runtime.cuda.fake_driver import CUBIN, FakeDriver
from tests.runtime.cuda.portable import Portable
from tests.runtime.cuda.shim_device import ShimDevice
from tests.runtime.cuda.shimmed import FORWARD

Array = np.ndarray[Any, Any]
Logits = Callable[[Any], Array]

TOLERANCE = 0.01
"""Largest difference of a logit, as a share of the largest: the graph rounds every value to fp16, the kernels fewer."""


def draw_opt(directory: Path) -> None:
    drawing.save(directory, seed=5)


def draw_llama(directory: Path) -> None:
    """Two query heads share a head of keys; heads are 16 wide, as rotary positions in ONNX Runtime need."""
    drawing_llama.draw_blip2(directory, 6, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


KINDS = {"opt": draw_opt, "llama": draw_llama}


def bundles(tiny_bundle: Path, root: Path) -> Callable[[str, str], Path]:
    """The bundle of a kind in a precision: fp16, fp32, or with weights in int8 or int4 on fp16."""

    def exported(kind: str, precision: str) -> Path:
        checkpoint, output = root / kind, root / f"{kind}-{precision}"
        if not checkpoint.exists():
            KINDS[kind](checkpoint)
        return output if output.exists() else export_checkpoint(checkpoint, output, precision=precision).bundle

    def made(kind: str, precision: str) -> Path:
        if (kind, precision) == ("opt", "fp32"):
            return tiny_bundle
        if not precision.startswith("int"):
            return exported(kind, precision)
        output, pictures = root / f"{kind}-{precision}", root / "pictures"
        if not pictures.exists():
            pictures.mkdir()
            for at, picture in enumerate(drawing.draw_pictures(4)):
                picture.save(pictures / f"{at}.png")
        if not output.exists():
            parent = exported(kind, "fp16")
            calibrate(parent, output, images=pictures, weights=precision, activations=(), threads=1)
        return output

    return made


class Pair:
    """The same decoder in kernels and as the portable graph."""

    def __init__(
        self, directory: Path, rows: Sequence[int], order: int = FORWARD, multiprocessors: int = 4, driver: bool = False
    ) -> None:
        bundle = Bundle.open(directory)
        manifest, spec, path = bundle.manifest, bundle.graph(DECODER).spec, bundle.file(f"{DECODER}.onnx")
        assert manifest.cache is not None
        self.layout = layout_of_graph(load_graph(path), manifest.cache, manifest.max_positions)
        table = bundle.file(EMBEDDINGS_FILE)
        kernels = needed_kernels(planned_weights(self.layout), rows)
        kernels += table_format(SafetensorsFile(table), EMBEDDINGS_TENSOR).kernels
        self.shim, self.driver = (
            ShimDevice(multiprocessors, order),
            FakeDriver(kernels, multiprocessors=multiprocessors),
        )
        self.device: KernelDevice = self.shim
        if driver:
            self.device = opened = DriverDevice(self.driver)
            opened.load(CUBIN)
        else:
            self.shim.compile(kernels)
        weights = load_weights(self.layout, directory, self.device)
        stored = load_table(table, EMBEDDINGS_TENSOR, self.device)
        dtype = next(tensor.dtype for tensor in spec.inputs if tensor.name == "inputs_embeds")
        self.table = TokenTable(bundle.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, dtype)
        self.session = session = KernelSession(weights, self.device)
        self.kernels = KernelDecoder(session, spec, manifest.cache, self.table, manifest.max_positions, stored)
        self.graph = GrowingDecoder(Portable(path), spec, manifest.cache, self.table)
        self.compared = 0

    def prompts(self, lengths: Sequence[int], seed: int = 0) -> list[Array]:
        random = np.random.default_rng(seed)
        return [self.table.rows(random.integers(4, 100, length)) for length in lengths]

    def same(self, found: Array, wanted: Array) -> Array:
        """Checks logits, and returns the likeliest tokens, which must be equal."""
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
        tokens: Array = wanted.argmax(axis=-1)
        assert np.array_equal(found.argmax(axis=-1), tokens)
        self.compared += tokens.size
        return tokens


SLOW = pytest.mark.slow
EVERY = [
    pytest.param("opt", "fp32"),  # its weights are rounded to fp16
    pytest.param("llama", "int4"),
    pytest.param("opt", "fp16", marks=SLOW),
    pytest.param("opt", "int8", marks=SLOW),
    pytest.param("opt", "int4", marks=SLOW),
    pytest.param("llama", "fp16", marks=SLOW),
    pytest.param("llama", "int8", marks=SLOW),
]
