"""Parses the text of GStreamer pipelines, and reads their pictures with OpenCV if OpenCV is built with GStreamer."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import threading
import time
from collections.abc import Generator
from typing import Any

from blip2edge.errors import BackendError, DataError, one_line, shown_address

CSI = "nvarguscamerasrc sensor-id={} ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=30/1 ! nvvidconv"
"""Text of the pipeline for a camera on the CSI connector of a Jetson; ``{}`` is the camera's number."""

APPSINK = re.compile(r"(\s*!\s*videoconvert[^!]*)?(\s*!\s*video/x-raw\s*,\s*format=\S*BGR\S*)?\s*!\s*appsink\b[^!]*$")
"""Matches the end of a pipeline that was written for OpenCV: an ``appsink`` element, perhaps after conversions."""


def pipeline_reader() -> Any:
    """Returns OpenCV's module if OpenCV can read pipelines; None if the program ``gst-launch-1.0`` must run them.

    Raises:
        BackendError: Neither OpenCV with GStreamer nor ``gst-launch-1.0`` is installed.
    """
    cv2 = opencv()
    if cv2 is None and shutil.which("gst-launch-1.0") is None:
        raise BackendError(
            "a pipeline needs gst-launch-1.0, or OpenCV with GStreamer; neither is installed",
            "install GStreamer: sudo apt install gstreamer1.0-tools gstreamer1.0-plugins-{base,good,bad}",
        )
    return cv2


def opencv() -> Any:
    """Returns OpenCV's module; None if it is not installed or built without GStreamer (as PyPI's wheels are)."""
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError:
        return None
    return cv2 if re.search(r"GStreamer:\s+YES", cv2.getBuildInformation()) else None


def opencv_pictures(cv2: Any, text: str, closed: threading.Event) -> Generator[tuple[float, Any], None, None]:
    """Yields the pictures that OpenCV reads from a pipeline, with the seconds since its start.

    If the pipeline has no ``appsink`` element for OpenCV at its end, such an element is added. The pictures are uint8
    ``[H, W, 3]`` in RGB.
    """
    end = "" if APPSINK.search(text) else " ! videoconvert ! video/x-raw,format=BGR ! appsink drop=true max-buffers=1"
    capture = cv2.VideoCapture(text + end, cv2.CAP_GSTREAMER)
    start = time.perf_counter()
    try:
        if not capture.isOpened():
            raise DataError(f"OpenCV cannot open the pipeline {shown_address(text)}", "try it with gst-launch-1.0")
        while not closed.is_set():
            is_read, picture = capture.read()
            if not is_read:
                return
            yield time.perf_counter() - start, picture[..., ::-1]  # BGR
    finally:
        capture.release()


def pipeline_words(pipeline: str) -> list[str]:
    """Splits the text of a pipeline into words, without an ``appsink`` element (which is for OpenCV) at its end."""
    try:
        return shlex.split(APPSINK.sub("", pipeline))
    except ValueError as error:
        raise DataError(
            f"expected a pipeline whose quotes are closed and whose last character is no backslash, got "
            f"{shown_address(pipeline)} ({one_line(error)})",
            'close the quotes: within the quotes of the shell, write values with spaces as name="a b"',
        ) from error
