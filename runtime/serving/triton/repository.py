"""Writes a model of a Triton model repository: its ``config.pbtxt``, ``model.py`` and bundle.

REPOSITORY/NAME/config.pbtxt    inputs, outputs, batching, instances (Triton's ``ModelConfig`` as protobuf text)
REPOSITORY/NAME/1/model.py      imports ``TritonPythonModel`` of :mod:`blip2edge.runtime.serving.triton.python_model`
REPOSITORY/NAME/1/bundle        a copy of the bundle, or a link to it
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.outputs.publishing import check_not_inside, check_not_source, staged
from blip2edge.bundle.schema import DECODER, BackendName
from blip2edge.errors import BundleError, UsageError, option
from blip2edge.version import __version__

CONFIG, MODEL, BUNDLE = "config.pbtxt", "model.py", "bundle"
VERSION = "1"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

INPUTS = (("image", "TYPE_STRING", False), ("prompt", "TYPE_STRING", True), ("max_new_tokens", "TYPE_INT32", True))
"""The model's inputs: name, Triton's type, and whether the input may be left out. Each row has one value of each."""

OUTPUTS = (("text", "TYPE_STRING"), ("json", "TYPE_STRING"))
"""The model's outputs: name and Triton's type. ``text`` is the caption, ``json`` the object of ``caption --json``."""


@dataclass(frozen=True)
class TritonModel:
    """The settings with which Triton runs a bundle.

    Attributes:
        name: Name of the model; empty for the name of the bundle's directory.
        max_batch: Largest number of captions decoded in one batch.
        delay_us: Microseconds for which Triton waits for further requests of a batch.
        instances: Number of processes, each of which loads the bundle.
        threads: CPU threads of each process; None for all cores.
        backend: As in ``Captioner.load``.
        stream: Whether the model sends pieces of the text as they are generated (Triton's decoupled mode).
        link: Whether to link the bundle's directory instead of copying it.
    """

    name: str = ""
    max_batch: int = 8
    delay_us: int = 2000
    instances: int = 1
    threads: int | None = None
    backend: BackendName = "auto"
    stream: bool = False
    link: bool = False


def write_model(bundle: str | Path, repository: Path, model: TritonModel, *, force: bool = False) -> Path:
    """Writes a bundle as a model into a Triton model repository; makes the repository if it is missing.

    Args:
        bundle: A bundle that captions.
        repository: Directory of the repository; other models in it stay.
        model: How Triton runs it.
        force: Whether a model of the same name is replaced.

    Returns:
        The model's directory.

    Raises:
        BundleError: ``bundle`` is no bundle, or does not caption.
        OutputError: The model exists and ``force`` is False, or it cannot be written; or one of the directories of
            model and bundle is inside the other directory.
        UsageError: The name has characters that Triton does not allow in an address.
    """
    opened = Bundle.open(bundle)
    if DECODER not in opened.manifest.graphs:
        raise BundleError(f"{bundle} compares pictures with texts and cannot caption them", "use serve")
    path = opened.path.resolve()
    name = model.name or path.name
    if NAME.fullmatch(name) is None:
        raise UsageError(
            f"expected {option('name')} to have letters, digits, dots, hyphens and underscores, got {name!r}",
            f"give another name with {option('name')}",
        )
    target = repository / name
    check_not_source(target, path)
    check_not_inside(target, path)
    with staged(target, force, CONFIG) as staging:
        version = staging / VERSION
        version.mkdir()
        (staging / CONFIG).write_text(config_text(name, model), encoding="utf-8")
        (version / MODEL).write_text(MODEL_TEXT, encoding="utf-8")
        if model.link:
            (version / BUNDLE).symlink_to(path, target_is_directory=True)
        else:
            shutil.copytree(path, version / BUNDLE)
    return target


MODEL_TEXT = f'''"""Captions pictures with the bundle beside this file. Written by blip2edge {__version__}.

The Python of Triton's Python backend needs blip2edge with the extra `cpu`, or another backend's: docs/triton.md.
"""

from blip2edge.runtime.serving.triton.python_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def config_text(name: str, model: TritonModel) -> str:
    """Returns the model's ``config.pbtxt``. Texts are quoted as in JSON, which is valid in protobuf's text format."""
    inputs = ",\n".join(
        f"  {{ name: {json.dumps(one)} data_type: {kind} dims: [ 1 ]{' optional: true' if optional else ''} }}"
        for one, kind, optional in INPUTS
    )
    outputs = ",\n".join(f"  {{ name: {json.dumps(one)} data_type: {kind} dims: [ 1 ] }}" for one, kind in OUTPUTS)
    parameters = {
        "backend": model.backend,
        "threads": "" if model.threads is None else str(model.threads),
        "max_batch": str(model.max_batch),
    }
    written = "\n".join(
        f"parameters {{ key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }} }}"
        for key, value in parameters.items()
    )
    # A decoupled model batches the requests by itself, at each token: Triton gives it one at a time.
    batching = (
        "max_batch_size: 1\nmodel_transaction_policy { decoupled: true }"
        if model.stream
        else f"max_batch_size: {model.max_batch}\ndynamic_batching {{ max_queue_delay_microseconds: {model.delay_us} }}"
    )
    return f"""# Written by blip2edge {__version__}.
name: {json.dumps(name)}
backend: "python"
{batching}
input [
{inputs}
]
output [
{outputs}
]
instance_group [ {{ count: {model.instances} kind: KIND_CPU }} ]
{written}
"""
