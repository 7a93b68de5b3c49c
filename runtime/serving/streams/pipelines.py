"""The text of a GStreamer pipeline: its words, and its end as it is written for OpenCV."""

from __future__ import annotations

import re
import shlex

from blip2edge.errors import DataError, one_line, shown_address

APPSINK = re.compile(r"(\s*!\s*videoconvert[^!]*)?(\s*!\s*video/x-raw\s*,\s*format=\S*BGR\S*)?\s*!\s*appsink\b[^!]*$")
"""The end of a pipeline as it is written for OpenCV."""


def words_of(pipeline: str) -> list[str]:
    """The words of a pipeline, without its end for OpenCV."""
    try:
        return shlex.split(APPSINK.sub("", pipeline))
    except ValueError as error:
        raise DataError(
            f"expected a pipeline whose quotes are closed and whose last character is no backslash, got "
            f"{shown_address(pipeline)} ({one_line(error)})",
            'close the quotes: within the quotes of the shell, write values with spaces as name="a b"',
        ) from error
