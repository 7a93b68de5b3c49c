"""The model repository for Triton: its layout, and ``model.py`` run with a stand-in for Triton's Python module."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.cli import main
from blip2edge.errors import BundleError, EngineFaultError, OutputError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import Encoder
from blip2edge.runtime.captioning.restart import Backoff
from blip2edge.runtime.serving.triton import python_model
from blip2edge.runtime.serving.triton.repository import INPUTS, OUTPUTS, TritonModel, config_text, write_model
from tests.drawing import draw_pictures
from tests.http_calls import data_url, png_file
from tests.waiting import until

PNG = png_file()
PATIENCE_S = 60.0


class Tensor:
    """A tensor of Triton."""

    def __init__(self, name: str, values: Any) -> None:
        self.name, self._values = name, values

    def as_numpy(self) -> Any:
        return self._values


class TritonError(Exception):
    """An error of Triton."""

    INTERNAL, INVALID_ARG, UNAVAILABLE = "internal", "invalid", "unavailable"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Response:
    """A response of Triton."""

    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.as_numpy() for tensor in output_tensors}
        self.error = error

    def texts(self, name: str) -> list[str]:
        assert self.error is None, self.error
        assert self.outputs[name].dtype == np.object_
        assert self.outputs[name].shape[1:] == (1,)
        return [value.decode() for value in self.outputs[name][:, 0]]


class Sender:
    """Collects the responses of a decoupled request."""

    def __init__(self) -> None:
        self.sent: list[Response] = []
        self.flags: list[int] = []
        self.ended, self.cancelled = threading.Event(), False

    def send(self, response: Response, flags: int = 0) -> None:
        assert not self.ended.is_set()
        self.sent.append(response)
        self.flags.append(flags)
        if flags:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class Request:
    """A request of Triton: tensors by name."""

    def __init__(self, images: list[bytes], **more: list[Any]) -> None:
        texts = {"image": images, **more}
        self.tensors = {
            name: Tensor(name, np.array([[v] for v in values], np.int32 if name == "max_new_tokens" else np.object_))
            for name, values in texts.items()
        }
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender


STAND_IN = SimpleNamespace(
    Tensor=Tensor,
    InferenceResponse=Response,
    TritonError=TritonError,
    TritonModelException=RuntimeError,
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    get_input_tensor_by_name=lambda request, name: request.tensors.get(name),
)


def model_config(text: str) -> dict[str, Any]:
    """What Triton passes of a config: parameters and the transaction policy."""
    found = re.findall(r'parameters { key: "(\w+)" value: { string_value: "([^"]*)" } }', text)
    return {
        "parameters": {key: {"string_value": value} for key, value in found},
        "model_transaction_policy": {"decoupled": "decoupled: true" in text},
    }


Load = Callable[[Path], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads the written ``model.py`` as Triton does; its models end with the test."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", STAND_IN)
    models: list[Any] = []

    def loaded(directory: Path) -> Any:
        spec = importlib.util.spec_from_file_location("model", directory / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        config = model_config((directory / "config.pbtxt").read_text())
        model.initialize({"model_repository": str(directory), "model_version": "1", "model_config": json.dumps(config)})
        models.append(model)
        return model

    yield loaded
    for model in models:
        model.finalize()


def written(bundle: Path, repository: Path, *flags: str) -> Path:
    command = ["triton", str(bundle), "-o", str(repository), "--name", "m", "--threads", "1", *flags]
    assert main(command) == 0
    return repository / "m"


def test_captions_equal_those_of_the_command(
    tiny_bundle: Path, tmp_path: Path, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [tmp_path / f"{at}.png" for at in range(3)]
    for path, picture in zip(pictures, draw_pictures(3, 9), strict=True):
        picture.save(path)
    assert main(["caption", *map(str, pictures), "--json", "--prompt", "two", "-b", str(tiny_bundle)]) == 0
    wanted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    directory = written(tiny_bundle, tmp_path / "models")
    assert sorted(path.name for path in directory.rglob("*") if path.parent.name in ("m", "1")) == [
        "1",
        "bundle",
        "config.pbtxt",
        "model.py",
    ]
    files = [path.read_bytes() for path in pictures]
    model = load(directory)
    rows = Request(files[:2], prompt=[b"two"] * 2)
    lone = Request([data_url(PNG).encode()], max_new_tokens=[3])
    broken, last = Request([b"no picture"]), Request([files[2]], prompt=[b"two"])
    answers = model.execute([rows, lone, broken, last])
    texts, objects = (answers[0].texts(name) + answers[3].texts(name) for name in ("text", "json"))
    assert texts == [one["text"] for one in wanted]
    assert [json.loads(one)["tokens"] for one in objects] == [one["tokens"] for one in wanted]
    assert set(json.loads(objects[0])) == set(wanted[0])
    assert len(json.loads(answers[1].texts("json")[0])["tokens"]) <= 3
    assert answers[2].error.code == TritonError.INVALID_ARG
    assert "not a picture" in str(answers[2].error)


def test_a_decoupled_model_sends_pieces(tiny_bundle: Path, tmp_path: Path, load: Load) -> None:
    directory = written(tiny_bundle, tmp_path, "--stream", "--link")
    assert (directory / "1" / "bundle").resolve() == tiny_bundle.resolve()
    model = load(directory)
    requests = [Request([PNG], prompt=[b"two"]) for _ in range(3)] + [Request([b"x"]), Request([PNG, PNG])]
    assert model.execute(requests) is None
    with Captioner.load(tiny_bundle, threads=1) as captioner:
        wanted = captioner.caption(PNG, prompt="two")
    for request in requests[:3]:
        assert request.sender.ended.wait(PATIENCE_S)
        *pieces, last = request.sender.sent
        assert "".join(piece.texts("text")[0] for piece in pieces) == wanted.text
        assert len(pieces) > 2
        assert last.texts("text") == [""]
        assert json.loads(last.texts("json")[0])["tokens"] == list(wanted.tokens)
        assert request.sender.flags == [0] * len(pieces) + [1]
    for request in requests[3:]:
        assert request.sender.ended.wait(PATIENCE_S)
        assert [one.error and one.error.code for one in request.sender.sent] == [TritonError.INVALID_ARG]


def test_a_canceled_stream_ends(tiny_bundle: Path, tmp_path: Path, load: Load) -> None:
    model = load(written(tiny_bundle, tmp_path, "--stream", "--link"))
    request = Request([PNG])
    request.sender.cancelled = True
    model.execute([request])
    assert request.sender.ended.wait(PATIENCE_S)
    assert len(request.sender.sent) == 1
    assert request.sender.sent[0].error is not None


@pytest.mark.parametrize("flags", [(), ("--stream",)])
def test_only_faults_in_a_row_end_the_process(
    flags: tuple[str, ...], tiny_bundle: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, vision, ended = [False], Encoder.run_vision, threading.Event()

    def run_vision(*arguments: Any) -> Any:
        if broken[0]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return vision(*arguments)

    monkeypatch.setattr(Encoder, "run_vision", run_vision)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set() if status == 1 else None)
    monkeypatch.setattr(python_model, "Backoff", lambda: Backoff(0.001, 0.001, 2))
    model = load(written(tiny_bundle, tmp_path, "--link", *flags))
    engine, load_bundle, loadable = model._engine, model._engine._load, threading.Event()
    monkeypatch.setattr(engine, "_load", lambda: loadable.wait(PATIENCE_S) and load_bundle())

    def answer() -> Any:
        request = Request([PNG], max_new_tokens=[2])
        if not flags:
            return model.execute([request])[0]
        model.execute([request])
        assert request.sender.ended.wait(PATIENCE_S)
        return request.sender.sent[-1]

    for restarts in (1, 2, 3):  # more faults than attempts, with captions in between
        loadable.clear()
        broken[0] = True
        assert answer().error.code == TritonError.UNAVAILABLE
        broken[0] = False
        loadable.set()
        until(lambda: engine.restarts == restarts and engine.state == "ok")  # noqa: B023
        assert answer().error is None
    assert (engine.state, engine.restarts, ended.is_set()) == ("ok", 3, False)
    broken[0] = True
    assert answer().error.code == TritonError.UNAVAILABLE
    assert ended.wait(PATIENCE_S)
    assert answer().error.code == TritonError.UNAVAILABLE
    with pytest.raises(EngineFaultError):
        engine.ready()


def test_a_config_that_triton_reads() -> None:
    text = config_text('a"b', TritonModel(max_batch=4, instances=2, delay_us=5))
    assert 'name: "a\\"b"' in text
    for name, kind, optional in INPUTS:
        assert f'{{ name: "{name}" data_type: {kind} dims: [ 1 ]{" optional: true" if optional else ""} }}' in text
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    read = text_format.Parse(text, messages.ModelConfig())
    assert (read.name, read.backend, read.max_batch_size) == ('a"b', "python", 4)
    assert (read.instance_group[0].count, read.dynamic_batching.max_queue_delay_microseconds) == (2, 5)
    assert [one.name for one in read.output] == [name for name, _ in OUTPUTS]
    assert text_format.Parse(config_text("a", TritonModel(stream=True)), messages.ModelConfig()).HasField(
        "model_transaction_policy"
    )


def test_a_bundle_for_retrieval_is_refused(blip_itm: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot caption"):
        write_model(blip_itm, tmp_path, TritonModel())


@pytest.mark.parametrize("link", [False, True])
def test_a_model_in_its_own_bundle_is_refused(link: bool, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m"
    bundle.mkdir()
    for path in tiny_bundle.iterdir():
        if path.is_file():
            shutil.copy(path, bundle)
    before = sorted(bundle.rglob("*"))
    for repository in (bundle, bundle / "models"):
        with pytest.raises(
            OutputError, match=r"m lies in .*m, which is copied into it; give an output directory outside"
        ):
            write_model(bundle, repository, TritonModel(link=link))
        assert sorted(bundle.rglob("*")) == before
    written = write_model(bundle, tmp_path / "models", TritonModel(link=link))
    with pytest.raises(OutputError, match="which it is made from" if not link else "exists"):
        write_model(written / "1" / "bundle", tmp_path / "models", TritonModel(name="m", link=link), force=not link)


def test_refused(tiny_bundle: Path, tmp_path: Path, load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    directory = written(tiny_bundle, tmp_path, "--link")
    for flags, message in (
        ((), "exists"),
        (("--name", "a/b"), "expected --name to have letters"),
    ):
        assert main(["triton", str(tiny_bundle), "-o", str(tmp_path), "--name", "m", *flags]) != 0
        assert message in capsys.readouterr().err
    written(tiny_bundle, tmp_path, "--link", "--force")
    (directory / "1" / "bundle").unlink()
    os.mkdir(directory / "1" / "bundle")
    with pytest.raises(RuntimeError, match="bundle"):
        load(directory)
