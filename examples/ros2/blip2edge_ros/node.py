"""Captions the newest picture of the topic ``image`` and publishes its text on the topic ``caption``.

Parameters of the node:

- ``bundle``: directory of the bundle (required).
- ``prompt``: text that each caption continues; empty for the model's own prompt.
- ``max_fps``: largest number of captions per second; 0 for no limit.
- ``backend``: as ``blip2edge watch --backend``.
- ``threads``: CPU threads; 0 for all cores.
- ``max_new_tokens``: largest number of generated tokens; 0 for the bundle's own.

Pictures that arrive while one is captioned are dropped, except for the newest. Captions are made in a thread beside
the executor, so that other callbacks of the process are not delayed.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import rclpy
from numpy.typing import NDArray
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import String

from blip2edge import Captioner
from blip2edge.errors import Blip2EdgeError
from blip2edge.runtime.serving.streams.sources import Frame
from blip2edge.runtime.serving.watch import watch


class Encoding(NamedTuple):
    """The memory layout of the pixels of a ROS image encoding.

    Attributes:
        bits: Bits of a channel, 8 or 16.
        channels: Number of channels of a pixel.
        rgb: Positions of red, green and blue in a pixel; all 0 for grey.
    """

    bits: int
    channels: int
    rgb: tuple[int, int, int]


ENCODINGS = {
    "rgb8": Encoding(8, 3, (0, 1, 2)),
    "bgr8": Encoding(8, 3, (2, 1, 0)),
    "rgba8": Encoding(8, 4, (0, 1, 2)),
    "bgra8": Encoding(8, 4, (2, 1, 0)),
    "mono8": Encoding(8, 1, (0, 0, 0)),
    "mono16": Encoding(16, 1, (0, 0, 0)),
}
"""The encodings of ``sensor_msgs/image_encodings.hpp`` that are read; alpha is dropped."""


def to_rgb(message: Image) -> NDArray[np.uint8]:
    """Converts a message to an array.

    16-bit grey is scaled to 8 bits: 65535 becomes 255.

    Args:
        message: ``sensor_msgs/msg/Image``. Its rows may be padded to ``step`` bytes.

    Returns:
        Array [height, width, 3] of red, green and blue.

    Raises:
        ValueError: The encoding is not one of :data:`ENCODINGS`, its 16-bit values are big endian, ``step`` is shorter
            than a row, or there are fewer bytes than ``step`` × ``height``.
    """
    encoding = ENCODINGS.get(message.encoding)
    if encoding is None:
        raise ValueError(f"expected an encoding of {', '.join(ENCODINGS)}, got {message.encoding!r}")
    if message.is_bigendian and encoding.bits > 8:
        raise ValueError(f"{message.encoding} with big endian values is not read; publish little endian values")
    row = message.width * encoding.channels * encoding.bits // 8
    data = np.frombuffer(message.data, np.uint8)
    if message.step < row or len(data) < message.step * message.height or not row or not message.height:
        raise ValueError(
            f"expected {message.height} rows of at least {row} bytes for {message.width} pixels of {message.encoding}, "
            f"got a step of {message.step} and {len(data)} bytes"
        )
    rows = data[: message.step * message.height].reshape(message.height, message.step)[:, :row]
    if encoding.bits == 16:
        values = np.ascontiguousarray(rows).view("<u2").astype(np.uint32)
        rows = ((values * 255 + 32767) // 65535).astype(np.uint8)
    pixels = rows.reshape(message.height, message.width, encoding.channels)
    return np.ascontiguousarray(pixels[..., list(encoding.rgb)])


class NewestMessage:
    """Passes the newest message from the executor's thread to the captioning thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._message: Image | None = None
        self._closed = False

    def put(self, message: Image) -> None:
        """Stores a message for the captioning thread; replaces a message that was not taken yet."""
        with self._changed:
            self._message = message
            self._changed.notify()

    def close(self) -> None:
        """Ends the iteration in the captioning thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def __iter__(self) -> Iterator[Image]:
        """Waits for a message and yields the newest one, again and again, until :meth:`close` is called."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._message is not None)
                if self._closed:
                    return
                message, self._message = self._message, None
            yield message


class CaptionNode(Node):  # type: ignore[misc]  # rclpy has no types where it is absent
    """The ROS 2 node that captions pictures; its topics and parameters are described in the module."""

    def __init__(self) -> None:
        super().__init__("blip2edge")
        defaults: dict[str, Any] = {"bundle": "", "prompt": "", "backend": "auto", "max_fps": 0.0}
        for name, value in {**defaults, "threads": 0, "max_new_tokens": 0}.items():
            self.declare_parameter(name, value)
        bundle = self._parameter("bundle")
        if not bundle:
            raise ValueError("the parameter bundle is missing: --ros-args -p bundle:=/path/to/bundle")
        threads = self._parameter("threads") or None
        self._captioner = Captioner.load(bundle, backend=self._parameter("backend"), threads=threads)
        self._newest = NewestMessage()
        self._refused: set[str] = set()
        self._publisher = self.create_publisher(String, "caption", 10)
        self.create_subscription(Image, "image", self._newest.put, qos_profile_sensor_data)
        self._thread = threading.Thread(target=self._run, name="blip2edge-ros")
        self._thread.start()

    def destroy_node(self) -> None:
        """Ends the captioning thread, and destroys the node."""
        self._newest.close()
        self._thread.join()
        super().destroy_node()

    def _parameter(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _frames(self) -> Iterator[Frame]:
        """Yields the pictures of the messages. For unreadable messages, logs each different reason once."""
        for message in self._newest:
            try:
                picture = to_rgb(message)
            except ValueError as error:
                if str(error) not in self._refused:
                    self._refused.add(str(error))
                    self.get_logger().error(str(error))
                continue
            stamp = message.header.stamp
            yield Frame(f"{stamp.sec}.{stamp.nanosec:09d}", picture)

    def _run(self) -> None:
        """Captions pictures until the node is destroyed; any exception ends ROS in this process."""
        try:
            self._caption_all()
        except Blip2EdgeError as error:
            self.get_logger().error(str(error))
        except Exception:  # noqa: BLE001 - the executor would spin without captions
            self.get_logger().error(f"captions end with an unexpected error:\n{traceback.format_exc()}")
        else:
            return
        rclpy.try_shutdown()

    def _caption_all(self) -> None:
        tokens = self._parameter("max_new_tokens")
        results = watch(
            self._captioner,
            self._frames(),
            prompt=self._parameter("prompt") or None,
            every=True,  # NewestMessage drops those that come too fast
            max_fps=self._parameter("max_fps"),
            **({"max_new_tokens": tokens} if tokens else {}),
        )
        for one in results:
            if one.result is None:
                self.get_logger().error(one.error)
            else:
                self._publisher.publish(String(data=one.result.text))


def main(arguments: list[str] | None = None) -> None:
    """Runs the node until it is interrupted."""
    rclpy.init(args=arguments)
    node = CaptionNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        node.get_logger().info("interrupted")
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
