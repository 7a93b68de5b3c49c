"""The receivers of ``blip2edge watch``, besides standard output."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from blip2edge.runtime.serving.streams.annotated_video import AnnotatedVideo
from blip2edge.runtime.serving.streams.network_sinks import MqttSink, open_webhook
from blip2edge.runtime.serving.streams.queued_sink import Sink, SinkOptions

SINKS: Mapping[str, Callable[[str, SinkOptions], Sink]] = {
    "post": open_webhook,
    "mqtt": MqttSink,
    "annotated": AnnotatedVideo,
}
"""The sinks by the names of their flags; each is opened with the value of its flag."""
