"""The metrics of the server in the Prometheus format: counters, loads and histograms."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from blip2edge.runtime.captioning.request import STAGES, Request, Span

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass
class Distribution:
    """A histogram that any thread may add to.

    Attributes:
        name: Of the metric.
        text: Its description.
        labels: Names of its labels.
        bounds: Upper bounds of its buckets.
    """

    name: str
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = SECONDS
    _values: dict[tuple[str, ...], tuple[list[int], list[float]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, value: float, *labels: str) -> None:
        """Counts a value, with the values of the labels."""
        with self._lock:
            counts, total = self._values.setdefault(labels, ([0] * (len(self.bounds) + 1), [0.0]))
            counts[bisect_left(self.bounds, value)] += 1
            total[0] += value

    def family(self) -> HistogramMetricFamily:
        """The histogram, as ``prometheus_client`` reads it."""
        made = HistogramMetricFamily(self.name, self.text, labels=self.labels)
        with self._lock:
            copied = {labels: (list(counts), total[0]) for labels, (counts, total) in self._values.items()}
        for labels, (counts, total) in copied.items():
            sums = [sum(counts[: place + 1]) for place in range(len(counts))]
            bounds = [*map(str, self.bounds), "+Inf"]
            made.add_metric(labels, list(zip(bounds, sums, strict=True)), total)
        return made


class Metrics(Collector):
    """All metrics of a server.

    Args:
        load: Returns the requests in each queue.
        restarts: Returns how often the engine was loaded again.
        bodies: Returns the bytes of the bodies of open requests.

    Attributes:
        counts: Requests by their outcome.
        closed: Connections that the server closed, by the reason.
        open: Returns the number of open connections; set by the server of connections.
    """

    def __init__(
        self, load: Callable[[], Mapping[str, int]], restarts: Callable[[], int], bodies: Callable[[], int]
    ) -> None:
        self._load, self._restarts, self._bodies = load, restarts, bodies
        self.counts = {"done": 0, "failed": 0, "refused": 0, "cancelled": 0}
        self.closed: dict[str, int] = {}
        self.open: Callable[[], int] = lambda: 0
        self._tokens = 0
        self._stage_ms = dict.fromkeys(STAGES, 0.0)
        self._requests = Distribution(
            "blip2edge_request_seconds", "Time of a request by route and status", ("route", "status")
        )
        self._queue = Distribution("blip2edge_queue_seconds", "Wait of a caption in the queue")
        self._stages = Distribution("blip2edge_stage_latency_seconds", "Time of a caption's stage", ("stage",))
        self._first = Distribution("blip2edge_first_token_seconds", "Time to the first token of a caption")
        self._lengths = Distribution("blip2edge_caption_tokens", "Tokens of a caption", bounds=COUNTS)
        self._rows = Distribution("blip2edge_batch_rows", "Rows of a batch", ("stage",), COUNTS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that an ``Accept`` header asks for, and its content type."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def add_request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.add(seconds, route, str(status))

    def add_caption(self, caption: Request) -> None:
        """Counts a finished caption."""
        result = caption.result(0)
        self.counts["done"] += 1
        self._tokens += result.new_tokens
        self._lengths.add(result.new_tokens)
        for stage in STAGES:
            self._stage_ms[stage] += result.timings_ms[stage]
            self._stages.add(result.timings_ms[stage] / 1e3, stage)
        if caption.queue_s is not None:
            self._queue.add(caption.queue_s)
        if caption.first_token_s is not None:
            self._first.add(caption.first_token_s)

    def add_span(self, span: Span) -> None:
        """Counts the rows of a batch; called by the scheduler's threads."""
        if span.stage in ("vision", "prefill", "decode"):
            self._rows.add(len(span.requests), span.stage)

    def add_closed(self, reason: str) -> None:
        """Counts a connection that the server has closed."""
        self.closed[reason] = self.closed.get(reason, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """The metrics, as ``prometheus_client`` reads them."""
        yield _counter("blip2edge_requests", "Requests by their outcome", "outcome", self.counts)
        yield CounterMetricFamily("blip2edge_tokens", "Generated tokens", self._tokens)
        seconds = {stage: ms / 1e3 for stage, ms in self._stage_ms.items()}
        yield _counter("blip2edge_stage_seconds", "Seconds of each stage", "stage", seconds)
        load = GaugeMetricFamily("blip2edge_load", "Requests in each queue", labels=["where"])
        for where, count in self._load().items():
            load.add_metric([where], count)
        yield load
        yield CounterMetricFamily("blip2edge_engine_restarts", "Times the engine was loaded again", self._restarts())
        yield GaugeMetricFamily("blip2edge_connections", "Open connections", self.open())
        yield _counter("blip2edge_connections_closed", "Connections closed by the server", "reason", self.closed)
        yield GaugeMetricFamily("blip2edge_body_bytes", "Bytes of the bodies of open requests", self._bodies())
        shown: Sequence[Distribution] = (
            *(self._requests, self._queue, self._stages),
            *(self._first, self._lengths, self._rows),
        )
        for one in shown:
            yield one.family()


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    made = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        made.add_metric([value], count)
    return made
