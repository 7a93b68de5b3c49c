"""Bundles of every family in every precision, traced once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.drawing import draw_pictures

BundleOf = Callable[..., Path]
PICTURES = 2


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """A family's name and a precision (``fp32``) to its bundle; not to be changed.

    ``fp16`` casts the graph that was traced for ``fp32``; ``int8`` has quantised activations and weights in every
    graph of a captioner, ``int4`` the language model's weights in blocks.
    """
    pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.export import pipeline
    from tests.engine.families import FAMILIES

    root = tmp_path_factory.mktemp("engines")
    for index, picture in enumerate(draw_pictures(PICTURES)):
        (root / "pictures").mkdir(exist_ok=True)
        picture.save(root / "pictures" / f"{index}.png")
    traces: dict[tuple[str, str], Any] = {}

    def exported(name: str, precision: str) -> Path:
        original = pipeline.trace

        def traced_once(module: Any, spec: Any) -> Any:
            known = traces.get((name, spec.name))
            if known is None:
                known = traces[name, spec.name] = original(module, spec)
            return type(known)(known.model.clone(), known.spec, dict(known.slots))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "trace", traced_once)
            checkpoint, bundle = root / name / "checkpoint", root / name / precision
            if not checkpoint.exists():
                FAMILIES[name](checkpoint)
            return pipeline.export_checkpoint(checkpoint, bundle, precision=precision).bundle

    @cache
    def make(name: str, precision: str = "fp32") -> Path:
        if precision in ("fp32", "fp16"):
            return exported(name, precision)
        parent = make(name)
        graphs = tuple(path.stem for path in parent.glob("*.onnx"))
        options: dict[str, Any] = (
            {"weights": "int4"} if precision == "int4" else {"weights": "int8", "activations": graphs}
        )
        calibrate(parent, root / name / precision, images=root / "pictures", threads=1, **options)
        return root / name / precision

    return make
