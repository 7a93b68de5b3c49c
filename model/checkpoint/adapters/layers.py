"""Merges a PEFT adapter into the layers of a model, one layer at a time, and checks the outputs of merged layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.errors import CheckpointError, one_line
from blip2edge.model.checkpoint.stored.tensors import TensorFiles

ADAPTER_NAME = "default"

_INPUTS: Mapping[type[nn.Module], Callable[[Any], Tensor]] = {
    nn.Linear: lambda base: torch.linspace(-1, 1, 2 * base.in_features).view(2, -1).sin(),
    nn.Embedding: lambda base: torch.arange(min(8, base.num_embeddings)),
    nn.Conv2d: lambda base: torch.linspace(-1, 1, base.weight[0].numel()).view(1, -1, *base.kernel_size).sin(),
}
"""By the class of a layer that can be merged: a function that makes an input to test the merged layer.

Subclasses of these classes are refused, because they may use their weight in another way.
"""

CLOSE = 1e-3  # relative: a merged layer's output and the adapter's; float32 gives 1e-6

_WRAPPERS = ("base_layer", "original_module", "token_adapter", "modules_to_save", ADAPTER_NAME)
"""Parts that peft inserts into parameter names (between dots); the last is the name of the adapter."""

_ADAPTED = frozenset(("base_layer", "original_module", ADAPTER_NAME))
"""A parameter whose name has one of these parts (between dots) belongs to a layer with an adapter."""


Merged = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]
"""For each tensor that an adapter changes, by its name in the checkpoint: its shape and a function that returns it."""

INITS: Mapping[str, Callable[[Any], None]] = {
    "pissa": lambda layer: layer.pissa_init(ADAPTER_NAME, "pissa"),
    "olora": lambda layer: layer.olora_init(ADAPTER_NAME),
}
"""Values of ``init_lora_weights`` with which peft also changes the base's weights, and a function for each change."""


def cannot_merge(path: Path, reason: str) -> CheckpointError:
    """Makes the error for an adapter that export cannot merge; the advice is to merge it with the trainer's library."""
    return CheckpointError(
        f"the adapter of {path} cannot be merged: {reason}",
        "merge it where it was trained: merge_and_unload() of the PEFT model, then save_pretrained",
    )


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer of the model with an adapter on it.

    Attributes:
        path: Path of the layer in transformers' model.
        layer: peft's layer. It has no weights, except while the adapter is merged.
        readers: By the name of a parameter of the layer: the function that reads the parameter.
        names: By the name of a parameter of the layer: the name of its tensor in the checkpoint.
        init: Function that changes the weights as peft did at the start of the training; None for no change.
    """

    path: str
    layer: Any
    readers: Mapping[str, Callable[[], Tensor]]
    names: Mapping[str, str]
    init: Callable[[Any], None] | None

    def tensors(self) -> Merged:
        """Returns, for each merged tensor of the layer, its shape and a function that computes it.

        The keys are the names of the tensors in the checkpoint.
        """
        base = self.layer.get_base_layer()
        shapes = {name: tuple(base.get_parameter(name).shape) for name in self.readers}
        return {self.names[name]: (shape, partial(self.merged, name)) for name, shape in shapes.items()}

    def merged(self, name: str) -> Tensor:
        """Reads the weights of the layer, merges the adapter in float32, and returns the parameter ``name``.

        Raises:
            CheckpointError: The merged weights are not finite.
        """
        with self._filled() as base:
            try:
                self.layer.merge(safe_merge=True, adapter_names=[ADAPTER_NAME])
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"the adapter cannot be merged into {self.names[name]}: {one_line(error)}",
                    "use another adapter: the training of this one may have diverged",
                ) from error
            tensor: Tensor = base.get_parameter(name).detach()
            return tensor

    def difference(self) -> float:
        """Merges the adapter and returns the largest change of the layer's output, divided by the largest output.

        If peft merges correctly, the result is near 0: the merged layer gives the same output as layer plus adapter.
        """
        with self._filled() as base:
            x = _INPUTS[type(base)](base)
            before = self.layer(x)
            self.layer.merge(safe_merge=True, adapter_names=[ADAPTER_NAME])
            after = base(x)
            return float((before - after).abs().max() / before.abs().max().clamp(min=1e-12))

    @contextmanager
    def _filled(self) -> Iterator[nn.Module]:
        """Loads weights into the layer that the adapter changes; yields the layer; removes the weights at the end."""
        base: nn.Module = self.layer.get_base_layer()
        before = {name: base._parameters[name] for name in self.readers}
        try:
            for name, read in self.readers.items():
                base._parameters[name] = nn.Parameter(read().to(torch.float32, copy=True), requires_grad=False)
            with torch.no_grad():
                if self.init is not None:
                    trained = {
                        name: tensor.clone() for name, tensor in self.layer.state_dict().items() if "lora_" in name
                    }
                    self.init(self.layer)
                    self.layer.load_state_dict(trained, strict=False)
                yield base
        finally:
            base._parameters.update(before)
            self.layer.merged_adapters.clear()


def adapted_layers(
    model: nn.Module, files: TensorFiles, rename: Callable[[str], str], init: Callable[[Any], None] | None
) -> Iterator[AdaptedLayer]:
    """Yields each layer with an adapter; raises CheckpointError if the checkpoint lacks the weights of such a layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, BaseTunerLayer):
            continue
        readers: dict[str, Callable[[], Tensor]] = {}
        names: dict[str, str] = {}
        base: nn.Module = layer.get_base_layer()
        for name, parameter in base.named_parameters(recurse=False):
            names[name] = _plain(f"{path}.{name}", rename)
            if not _is_empty(parameter):  # the adapter's file has it: bias="lora_only"
                readers[name] = partial(_float, parameter)
            elif names[name] in files.shapes:
                readers[name] = files.reader(names[name])
            else:
                raise CheckpointError(
                    f"the adapter changes {names[name]}, but the base checkpoint {files.directory} has no such tensor",
                    f"check that {files.directory} is the adapter's base, and that its config.json fits its weights",
                )
        yield AdaptedLayer(path, layer, readers, names, init)


def replaced_tensors(model: nn.Module, rename: Callable[[str], str]) -> Merged:
    """Returns the tensors that the adapter's file holds completely, so that nothing must be merged.

    They are the tensors of the modules in ``modules_to_save``, and weights and biases of layers without an adapter.

    Returns:
        By the tensor's name in the checkpoint: its shape and a function that returns it.
    """
    found: Merged = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        parts = full.split(".")
        saved = f"modules_to_save.{ADAPTER_NAME}" in full
        if saved or (not _is_empty(parameter) and not _ADAPTED.intersection(parts) and parts[-1] in ("weight", "bias")):
            found[_plain(full, rename)] = (tuple(parameter.shape), partial(_float, parameter))
    return found


def _is_empty(parameter: Tensor) -> bool:
    return parameter.ndim > 0 and not any(parameter.stride())


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float()


def _plain(full: str, rename: Callable[[str], str]) -> str:
    """Converts a parameter name in peft's model to the name in the checkpoint, without the parts that peft added."""
    return rename(".".join(part for part in full.split(".") if part not in _WRAPPERS))


def check_each_kind(layers: Sequence[AdaptedLayer], path: Path) -> None:
    """Merges one layer of each kind, and compares the layer's outputs before and after the merge.

    So an adapter that cannot be merged is refused before any file is written.

    Raises:
        CheckpointError: A layer cannot be merged.
    """
    kinds = {(type(item.layer), type(item.layer.get_base_layer())): item for item in reversed(layers)}
    for (_, base), item in kinds.items():
        if base not in _INPUTS:
            raise CheckpointError(
                f"the adapter of {path} cannot be merged: {item.path} is of the class {base.__name__}, "
                f"not {', '.join(kind.__name__ for kind in _INPUTS)}",
                "train it without this layer in target_modules, or with the layer in modules_to_save",
            )
        try:
            difference = item.difference()
        except Exception as error:  # each kind of layer in peft raises its own
            raise cannot_merge(path, f"{item.path}: {one_line(error)}") from error
        if not difference <= CLOSE:
            raise cannot_merge(path, f"merging changes the output of {item.path} by {difference:.2g} (relative)")
