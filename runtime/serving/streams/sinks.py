"""Lists the sinks of ``blip2edge watch``: the receivers of captions besides standard output."""

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
"""For each flag of ``watch`` that names a sink, the function that opens the sink; its argument is the flag's value."""
