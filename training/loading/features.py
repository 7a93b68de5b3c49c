"""Encodes pictures with the frozen picture encoder, and caches the result on disk if the recipe sets `cache_features`.

A cache is one directory for one encoder and one preprocessing, named by their hash. Each run appends to its own files:
rows of fixed size, and an index with one line for each batch. A line is written after its rows, so a run that is killed
leaves complete batches only. If one picture of a batch is missing from the cache, the whole batch is encoded. So the
features of a batch are equal whether or not a run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from blip2edge.bundle.fields import list_of, text
from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.errors import DataError, OutputError
from blip2edge.reading import DATA_BYTES, parse_json, read_text, reading
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.training.data.sources import Sample

_LINE = list_of(text)
_ROWS, _INDEX = ".rows", ".index.jsonl"


def encoder_hash(vision: nn.Module, preprocessing: Preprocessing, kind: str) -> str:
    """Computes a hash of all that changes cached features: encoder weights, preprocessing, and type of the values.

    Args:
        vision: The picture encoder.
        preprocessing: Preprocessing of the pictures.
        kind: dtype of the stored values and dtype of the encoder's arithmetic, as one text.
    """
    digest = hashlib.sha256(json.dumps([preprocessing.to_json(), kind], sort_keys=True).encode())
    for name, tensor in vision.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


class FeatureCache:
    """Stores the picture encoder's features `[P, D]` of pictures on disk, by the picture's name.

    Args:
        directory: Directory of the cache; each encoder has its own.
        shape: Shape (P, D) of one picture's features.
        dtype: dtype of the stored values: "float32" or "float16".
    """

    def __init__(self, directory: Path, shape: tuple[int, int], dtype: str) -> None:
        self._directory = directory
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._row_bytes = shape[0] * shape[1] * self._dtype.itemsize
        self._places: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, int] = {}
        self._own: tuple[IO[bytes], IO[str], Path] | None = None
        self._written = 0
        for index in sorted(directory.glob(f"*{_INDEX}")):
            rows = index.with_name(index.name.removesuffix(_INDEX) + _ROWS)
            names = _names(index)
            held = rows.stat().st_size // self._row_bytes if rows.exists() else 0
            for number, name in enumerate(names[:held]):
                self._places.setdefault(name, (rows, number))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Reads cached features: float32 [B, P, D].

        Raises:
            KeyError: A picture is not in the cache.
        """
        rows = np.empty((len(names), *self._shape), np.float32)
        for number, name in enumerate(names):
            path, place = self._places[name]
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            content = os.pread(self._open[path], self._row_bytes, place * self._row_bytes)
            rows[number] = np.frombuffer(content, self._dtype).reshape(self._shape)
        return rows

    def add(self, names: Sequence[str], rows: NDArray[np.float32]) -> None:
        """Adds the features of a batch: ``rows [B, P, D]`` for the pictures ``names``.

        Raises:
            DataError: A feature is too large for the cache's dtype, or not finite.
            OutputError: The disk is full or not writable; features of earlier batches remain usable.
        """
        fresh = {name: number for number, name in enumerate(names) if name not in self._places}
        if not fresh:
            return
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows[list(fresh.values())].astype(self._dtype))
        for name, row, kept in zip(fresh, rows[list(fresh.values())], stored, strict=True):
            if not np.isfinite(kept).all():
                raise DataError(
                    f"the features of {name} do not fit into {self._dtype}: the largest is {np.abs(row).max():.4g}",
                    "set features_dtype = 'float32' in [loop]",
                )
        try:
            file, index, path = self._files()
            file.write(stored.tobytes())
            file.flush()
            index.write(json.dumps(list(fresh)) + "\n")
            index.flush()
        except OSError as error:
            raise OutputError(
                output_error(self._directory, error).problem,
                "free some space and run the command again, or set cache_features to false",
            ) from error
        for name in fresh:
            self._places[name] = (path, self._written)
            self._written += 1

    def _files(self) -> tuple[IO[bytes], IO[str], Path]:
        if self._own is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            stem = self._directory / uuid.uuid4().hex
            path = stem.with_name(stem.name + _ROWS)
            index = stem.with_name(stem.name + _INDEX)
            self._own = (open(path, "wb"), open(index, "w", encoding="utf-8"), path)  # noqa: SIM115 - closed in close
        return self._own

    def close(self) -> None:
        """Closes the open files of the cache."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        if self._own is not None:
            self._own[0].close()
            self._own[1].close()


def _names(index: Path) -> list[str]:
    """Returns the names of the pictures in the complete lines of an index file.

    Raises:
        DataError: The index is damaged.
    """
    fix = f"remove the directory {index.parent}: it is a cache"
    text = read_text(index, DataError, fix, limit=DATA_BYTES)
    with reading(index, "an index of features", DataError, fix):
        lines = [parse_json(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
        for line in lines:
            _LINE(line, "a line")
    return [name for line in lines for name in line]


class PictureReader:
    """Opens the pictures of samples, without encoding, for a phase whose module contains the (trained) picture encoder.

    Args:
        preprocessing: Preprocessing of the pictures.
        accelerator: The device.
    """

    def __init__(self, preprocessing: Preprocessing, accelerator: Accelerator) -> None:
        self.preprocessing = preprocessing
        self._accelerator = accelerator

    def open(self, sample: Sample) -> NDArray[np.float32] | None:
        """Opens a sample's picture; returns its pixel values [3, H, W].

        Raises:
            ImageError: The picture is broken.
        """
        return self.preprocessing(sample.open_picture())

    def encode(self, samples: Sequence[Sample], pixels: Sequence[NDArray[np.float32] | None]) -> Tensor:
        """Stacks the pixel values of a batch's pictures: float32 [B, 3, H, W] on the device. Nothing is encoded.

        Args:
            samples: Not used.
            pixels: Result of `open` for each sample.
        """
        del samples
        rows = [each for each in pixels if each is not None]
        return torch.from_numpy(np.stack(rows)).to(self._accelerator.device)

    def close(self) -> None:
        """Does nothing: no file stays open."""


def of_shape(name: str, rows: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Returns the features [P, D] that a sample has in place of a picture.

    Args:
        name: Id of the sample, for messages.
        rows: The features.
        shape: Shape (P, D) of the output of the recipe's picture encoder for one picture.

    Raises:
        DataError: The features are of another shape.
    """
    if rows.shape != shape:
        raise DataError(
            f"{name}: the picture encoder's features have the shape {shape}, got {rows.shape}",
            "make the features with the encoder of the recipe",
        )
    return rows


class FrozenEncoder:
    """Opens the pictures of samples and encodes them with the frozen picture encoder.

    Args:
        vision: The picture encoder, frozen and in eval mode.
        preprocessing: Preprocessing of the pictures.
        accelerator: Device and arithmetic.
        cache: Cache of the encoder's output. Without a cache (None), every picture is encoded each time.
        autocast: Whether the encoder runs in the accelerator's arithmetic; if not, it runs in the dtype of its weights.
    """

    def __init__(
        self,
        vision: nn.Module,
        preprocessing: Preprocessing,
        accelerator: Accelerator,
        cache: FeatureCache | None = None,
        autocast: bool = True,
    ) -> None:
        self.vision = vision.to(accelerator.device)
        self._autocast = autocast
        self.preprocessing = preprocessing
        self.cache = cache
        self._accelerator = accelerator

    def open(self, sample: Sample) -> NDArray[np.float32] | None:
        """Opens a sample's picture; returns its pixel values [3, H, W], or None if its features are cached.

        For a sample with features in place of a picture, returns the features [P, D].

        Raises:
            ImageError: The picture is broken.
            DataError: The features are broken, or not of this encoder's shape.
        """
        if sample.features is not None:
            config: Any = self.vision.config
            return of_shape(sample.sample_id, sample.features(), (config.num_embeds, config.hidden_size))
        if self.cache is not None and sample.image_id in self.cache:
            return None
        return self.preprocessing(sample.open_picture())

    def close(self) -> None:
        """Closes the files of the cache."""
        if self.cache is not None:
            self.cache.close()

    def encode(self, samples: Sequence[Sample], pixels: Sequence[NDArray[np.float32] | None]) -> Tensor:
        """Encodes the pictures of a batch; returns float32 [B, P, Dv] on the device.

        Args:
            samples: B samples.
            pixels: Result of `open` for each sample.
        """
        device = self._accelerator.device
        shown = [number for number, sample in enumerate(samples) if sample.features is None]
        if len(shown) == len(samples):
            return self._encode(samples, pixels)
        rows = [torch.from_numpy(each).to(device) if each is not None else torch.empty(0) for each in pixels]
        if shown:  # the others have features, whose shape `open` checked
            embeds = self._encode([samples[number] for number in shown], [pixels[number] for number in shown])
            for number, row in zip(shown, embeds, strict=True):
                rows[number] = row
        return torch.stack(rows)

    @torch.no_grad()
    def _encode(self, samples: Sequence[Sample], pixels: Sequence[NDArray[np.float32] | None]) -> Tensor:
        device = self._accelerator.device
        names = [sample.image_id for sample in samples]
        if self.cache is not None and all(name in self.cache for name in names):
            return torch.from_numpy(self.cache.read(names)).to(device)
        opened = [
            self.preprocessing(sample.open_picture()) if each is None else each
            for sample, each in zip(samples, pixels, strict=True)
        ]
        with self._accelerator.autocast() if self._autocast else nullcontext():
            pixels_in = torch.from_numpy(np.stack(opened)).to(device, next(self.vision.parameters()).dtype)
            embeds: Tensor = self.vision(pixels_in)
        embeds = embeds.float()
        if self.cache is None:
            return embeds
        self.cache.add(names, embeds.cpu().numpy())
        # Return the stored values, so that the first pass and later ones use the same numbers.
        return torch.from_numpy(self.cache.read(names)).to(device)
