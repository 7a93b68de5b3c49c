"""The ROS 2 node, with stand-ins for rclpy and its messages: ROS is not installed here."""

from __future__ import annotations

import ast
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.errors import BackendError
from blip2edge.runtime.captioning.captioner import Captioner
from tests.drawing import draw_pictures
from tests.waiting import until

PACKAGE = Path(__file__).parents[2] / "examples" / "ros2"
PATIENCE_S = 30.0


class FakeNode:
    """A node whose topics are lists, and whose parameters are set beforehand."""

    parameters: dict[str, Any] = {}  # noqa: RUF012 - set by each test

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[str, Any] = {}
        self.topics: dict[str, Callable[[Any], None]] = {}
        self.sent: list[Any] = []
        self.errors: list[str] = []
        self.destroyed = False

    def declare_parameter(self, name: str, value: Any) -> None:
        self.values[name] = self.parameters.get(name, value)
        assert isinstance(self.values[name], type(value))

    def get_parameter(self, name: str) -> Any:
        return SimpleNamespace(value=self.values[name])

    def create_publisher(self, kind: type, topic: str, depth: int) -> Any:
        assert (kind, topic) == (String, "caption")
        return SimpleNamespace(publish=self.sent.append)

    def create_subscription(self, kind: type, topic: str, callback: Callable[[Any], None], qos: Any) -> None:
        assert (kind, qos) == (Image, "sensor data")
        self.topics[topic] = callback

    def get_logger(self) -> Any:
        return SimpleNamespace(error=self.errors.append, info=lambda text: None)

    def destroy_node(self) -> None:
        self.destroyed = True


class Image:
    """sensor_msgs/msg/Image, with its fields."""

    def __init__(self, rows: NDArray[Any], encoding: str, padding: int = 0, big: bool = False) -> None:
        self.header = SimpleNamespace(stamp=SimpleNamespace(sec=7, nanosec=5))
        self.height, self.width = rows.shape[:2]
        self.encoding, self.is_bigendian = encoding, int(big)
        lines = rows.reshape(self.height, -1).view(np.uint8)
        self.step = lines.shape[1] + padding
        self.data = np.pad(lines, ((0, 0), (0, padding)), constant_values=99).tobytes()


class String:
    """std_msgs/msg/String."""

    def __init__(self, data: str) -> None:
        self.data = data


class ExternalShutdownException(Exception):  # noqa: N818 - its name in rclpy
    """Raised by ``spin`` when ROS is shut down."""


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The node's module, and the calls of rclpy."""
    calls: list[str] = []
    stand_ins = [
        module("rclpy", init=lambda args: calls.append("init"), try_shutdown=lambda: calls.append("shutdown")),
        module("rclpy.executors", ExternalShutdownException=ExternalShutdownException),
        module("rclpy.node", Node=FakeNode),
        module("rclpy.qos", qos_profile_sensor_data="sensor data"),
        module("sensor_msgs"),
        module("sensor_msgs.msg", Image=Image),
        module("std_msgs"),
        module("std_msgs.msg", String=String),
    ]
    for one in stand_ins:
        monkeypatch.setitem(sys.modules, one.__name__, one)
    spec = importlib.util.spec_from_file_location("blip2edge_ros.node", PACKAGE / "blip2edge_ros" / "node.py")
    assert spec is not None
    assert spec.loader is not None
    node = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "blip2edge_ros.node", node)
    spec.loader.exec_module(node)
    yield SimpleNamespace(node=node, calls=calls, rclpy=stand_ins[0])
    assert not [thread for thread in threading.enumerate() if thread.name == "blip2edge-ros"]


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
ALPHA = np.full((5, 7, 1), 9, np.uint8)
GREY = RGB[..., 0]
DEEP = np.array([[0, 1, 128, 129], [257, 32768, 65534, 65535]], "<u2")
CASES = [
    ("rgb8", RGB, RGB),
    ("bgr8", np.ascontiguousarray(RGB[..., ::-1]), RGB),
    ("rgba8", np.concatenate([RGB, ALPHA], 2), RGB),
    ("bgra8", np.concatenate([RGB[..., ::-1], ALPHA], 2), RGB),
    ("mono8", GREY, np.stack([GREY] * 3, 2)),
    ("mono16", DEEP, np.stack([np.array([[0, 0, 0, 1], [1, 128, 255, 255]])] * 3, 2)),
]


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize(("encoding", "rows", "wanted"), CASES, ids=[case[0] for case in CASES])
def test_encodings(ros: Any, encoding: str, rows: NDArray[Any], wanted: NDArray[Any], padding: int) -> None:
    made = ros.node.to_rgb(Image(rows, encoding, padding))
    assert (made.dtype, made.flags.c_contiguous) == (np.uint8, True)
    np.testing.assert_array_equal(made, wanted)


def test_every_encoding_is_tested(ros: Any) -> None:
    assert [case[0] for case in CASES] == list(ros.node.ENCODINGS)
    np.testing.assert_array_equal(ros.node.to_rgb(Image(RGB, "rgb8", big=True)), RGB)  # bytes have no order


def test_what_cannot_be_read_is_named(ros: Any) -> None:
    with pytest.raises(ValueError, match="mono16 with big endian values is not read"):
        ros.node.to_rgb(Image(DEEP, "mono16", big=True))
    with pytest.raises(ValueError, match=r"expected an encoding of rgb8, .*, got 'bayer_rggb8'"):
        ros.node.to_rgb(Image(GREY, "bayer_rggb8"))
    short = Image(RGB, "rgb8")
    short.data = short.data[:-1]
    with pytest.raises(ValueError, match="expected 5 rows of at least 21 bytes for 7 pixels of rgb8, got a step of 21"):
        ros.node.to_rgb(short)
    narrow = Image(RGB, "rgb8")
    narrow.step = 20
    with pytest.raises(ValueError, match="got a step of 20 and 105 bytes"):
        ros.node.to_rgb(narrow)
    empty = Image(RGB, "rgb8")
    empty.height = 0
    with pytest.raises(ValueError, match="expected 0 rows"):
        ros.node.to_rgb(empty)


def test_the_node_publishes_captions(ros: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [np.asarray(picture.convert("RGB")) for picture in draw_pictures(2, 3)]
    captioner = Captioner.load(tiny_bundle, threads=1)
    monkeypatch.setattr(FakeNode, "parameters", {"bundle": str(tiny_bundle), "threads": 1, "max_new_tokens": 4})

    def spin(node: Any) -> None:
        for number, picture in enumerate(pictures):
            node.topics["image"](Image(picture, "rgb8", 3))
            until(lambda: len(node.sent) > number)  # noqa: B023 - called in this turn
        for _ in range(2):
            node.topics["image"](Image(pictures[0], "yuv422"))
            until(lambda: node._newest._message is None)
        node.topics["image"](Image(pictures[1], "rgb8"))
        until(lambda: len(node.sent) == 3)
        wanted = [captioner.caption(picture, max_new_tokens=4).text for picture in (*pictures, pictures[1])]
        assert [message.data for message in node.sent] == wanted
        assert [error[:11] for error in node.errors] == ["expected an"]
        ros.calls.append("spun")
        raise ExternalShutdownException

    ros.rclpy.spin = spin
    ros.node.main()
    assert ros.calls == ["init", "spun", "shutdown"]


@pytest.mark.parametrize(
    ("error", "first", "last"),
    [
        (BackendError("the GPU is gone"), "the GPU is gone", "the GPU is gone"),
        (KeyError("text"), "captions end with an unexpected error:", "KeyError: 'text'"),
    ],
)
def test_any_exception_ends_ros(
    error: Exception, first: str, last: str, ros: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[Any]:
        raise error

    monkeypatch.setattr(FakeNode, "parameters", {"bundle": "BUNDLE", "threads": 1})
    monkeypatch.setattr(ros.node, "Captioner", SimpleNamespace(load=lambda *_, **__: None))
    monkeypatch.setattr(ros.node, "watch", broken)
    node = ros.node.CaptionNode()
    node._thread.join(PATIENCE_S)
    assert ros.calls == ["shutdown"]
    assert len(node.errors) == 1
    assert [node.errors[0].splitlines()[line] for line in (0, -1)] == [first, last]


def test_pictures_that_come_too_fast_are_dropped(ros: Any) -> None:
    newest = ros.node.NewestMessage()
    for number in range(3):
        newest.put(number)
    messages = iter(newest)
    assert next(messages) == 2
    newest.put(3)
    assert next(messages) == 3
    newest.close()
    assert list(messages) == []


def test_the_bundle_is_required(ros: Any) -> None:
    with pytest.raises(ValueError, match="the parameter bundle is missing"):
        ros.node.CaptionNode()


def test_the_package_is_complete() -> None:
    root = ElementTree.parse(PACKAGE / "package.xml").getroot()
    assert root.findtext("name") == "blip2edge_ros"
    needed = {one.text for one in root.findall("exec_depend")}
    imported = {
        alias
        for node in ast.walk(ast.parse((PACKAGE / "blip2edge_ros" / "node.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in [node.module.partition(".")[0]]
    }
    assert {"rclpy", "sensor_msgs", "std_msgs"} <= imported & needed
    setup = (PACKAGE / "setup.py").read_text()
    assert "caption = {NAME}.node:main" in setup
    for file in ("resource/blip2edge_ros", "package.xml", "launch/caption.launch.py", "setup.cfg"):
        assert (PACKAGE / file).is_file()
