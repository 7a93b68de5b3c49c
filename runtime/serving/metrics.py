"""The metrics of the server in the Prometheus format: counters, lengths of queues, and histograms.

A server of several bundles adds the label ``model`` to the metrics of each bundle.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from blip2edge.runtime.captioning.encoder import STAGES
from blip2edge.runtime.captioning.request import Pending, Request, Span

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass
class Distribution:
    """A histogram; several threads may add values at once.

    Attributes:
        name: Name of the metric.
        text: Description of the metric.
        labels: Names of the labels.
        bounds: Upper bounds of the buckets.
    """

    name: str
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = SECONDS
    _values: dict[tuple[str, ...], tuple[list[int], list[float]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, value: float, *labels: str) -> None:
        """Adds a value to the histogram; ``labels``: a value for each label, in the order of :attr:`labels`."""
        with self._lock:
            counts, total = self._values.setdefault(labels, ([0] * (len(self.bounds) + 1), [0.0]))
            counts[bisect_left(self.bounds, value)] += 1
            total[0] += value

    def family(self) -> HistogramMetricFamily:
        """Returns the histogram as an object of ``prometheus_client``."""
        made = HistogramMetricFamily(self.name, self.text, labels=self.labels)
        with self._lock:
            copied = {labels: (list(counts), total[0]) for labels, (counts, total) in self._values.items()}
        for labels, (counts, total) in copied.items():
            sums = [sum(counts[: place + 1]) for place in range(len(counts))]
            bounds = [*map(str, self.bounds), "+Inf"]
            made.add_metric(labels, list(zip(bounds, sums, strict=True)), total)
        return made


OUTCOMES = ("done", "failed", "refused", "cancelled")


class ModelMetrics:
    """The metrics of one bundle.

    Args:
        shared: The metrics of the server, which contain the histograms.
        model: Value of the label ``model``; None for a server of one bundle, whose metrics lack that label.
        load: Returns the number of requests in each queue.
        restarts: Returns how often the engine was loaded again.

    Attributes:
        counts: Number of requests by outcome (``done``, ``failed``, ``refused``, ``cancelled``). If the server has one
            bundle, it is the same object as ``Metrics.counts``.
        tokens: Number of generated tokens.
        stage_ms: Milliseconds by stage, summed over all captions.
    """

    def __init__(
        self, shared: Metrics, model: str | None, load: Callable[[], Mapping[str, int]], restarts: Callable[[], int]
    ) -> None:
        self.load, self.restarts = load, restarts
        self.counts = shared.counts if model is None else dict.fromkeys(OUTCOMES, 0)
        self.labels = () if model is None else (model,)
        self.tokens, self.stage_ms = 0, dict.fromkeys(STAGES, 0.0)
        self._shared = shared

    def add_call(self, call: Pending[Any]) -> None:
        """Counts a finished request."""
        self.counts["done"] += 1
        if call.queue_s is not None:
            self._shared.queue.add(call.queue_s, *self.labels)

    def add_caption(self, caption: Request) -> None:
        """Counts a finished caption."""
        self.add_call(caption)
        result, shared = caption.result(0), self._shared
        self.tokens += result.new_tokens
        shared.lengths.add(result.new_tokens, *self.labels)
        for stage in STAGES:
            self.stage_ms[stage] += result.timings_ms[stage]
            shared.stages.add(result.timings_ms[stage] / 1e3, stage, *self.labels)
        if caption.first_token_s is not None:
            shared.first.add(caption.first_token_s, *self.labels)

    def add_span(self, span: Span) -> None:
        """Adds the number of rows of a batch to a histogram; called by the scheduler's threads for each stage."""
        if span.stage in ("vision", "prefill", "decode"):
            self._shared.rows.add(len(span.requests), span.stage, *self.labels)


class Metrics(Collector):
    """All metrics of a server.

    Args:
        bodies: Returns the total bytes of the bodies of open requests.
        several: Whether the server has several bundles.

    Attributes:
        counts: Number of requests by outcome. If there are several bundles, only requests that were refused before
            their bundle was known; the others are counted in ``models``.
        models: The metrics of each bundle.
        closed: Number of connections that the server closed, by the reason.
        open: Returns the number of open connections; the code that serves connections sets it.
        queue, stages, first, lengths, rows: Histograms for all bundles: seconds in the queue, seconds of each stage,
            seconds to the first token, tokens of a caption, rows of a batch.
    """

    def __init__(self, bodies: Callable[[], int], *, several: bool = False) -> None:
        self._bodies, self._tail = bodies, ("model",) if several else ()
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.models: list[ModelMetrics] = []
        self.closed: dict[str, int] = {}
        self.open: Callable[[], int] = lambda: 0
        tail, staged = self._tail, ("stage", *self._tail)
        self._requests = Distribution(
            "blip2edge_request_seconds", "Time of a request by route and status", ("route", "status")
        )
        self.queue = Distribution("blip2edge_queue_seconds", "Wait of a caption in the queue", tail)
        self.stages = Distribution("blip2edge_stage_latency_seconds", "Time of a caption's stage", staged)
        self.first = Distribution("blip2edge_first_token_seconds", "Time to the first token of a caption", tail)
        self.lengths = Distribution("blip2edge_caption_tokens", "Tokens of a caption", tail, COUNTS)
        self.rows = Distribution("blip2edge_batch_rows", "Rows of a batch", staged, COUNTS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Returns the metrics as text in the format that an ``Accept`` header names, and their content type."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def add_request(self, route: str, status: int, seconds: float) -> None:
        """Adds the time of an answered request to the histogram of requests."""
        self._requests.add(seconds, route, str(status))

    def add_closed(self, reason: str) -> None:
        """Counts a connection that the server has closed."""
        self.closed[reason] = self.closed.get(reason, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics as objects of ``prometheus_client``."""
        models, tail = self.models, self._tail
        outcomes = [((name, *one.labels), n) for one in models for name, n in one.counts.items()]
        outcomes += [((name, ""), n) for name, n in self.counts.items()] if tail else []
        yield _counter("blip2edge_requests", "Requests by their outcome", ("outcome", *tail), outcomes)
        yield _counter("blip2edge_tokens", "Generated tokens", tail, [(one.labels, one.tokens) for one in models])
        seconds = [((stage, *one.labels), ms / 1e3) for one in models for stage, ms in one.stage_ms.items()]
        yield _counter("blip2edge_stage_seconds", "Seconds of each stage", ("stage", *tail), seconds)
        load = GaugeMetricFamily("blip2edge_load", "Requests in each queue", labels=["where", *tail])
        for one in models:
            for where, count in one.load().items():
                load.add_metric([where, *one.labels], count)
        yield load
        restarts = [(one.labels, one.restarts()) for one in models]
        yield _counter("blip2edge_engine_restarts", "Times the engine was loaded again", tail, restarts)
        yield GaugeMetricFamily("blip2edge_connections", "Open connections", self.open())
        closed = [((reason,), count) for reason, count in self.closed.items()]
        yield _counter("blip2edge_connections_closed", "Connections closed by the server", ("reason",), closed)
        yield GaugeMetricFamily("blip2edge_body_bytes", "Bytes of the bodies of open requests", self._bodies())
        for each in (self._requests, self.queue, self.stages, self.first, self.lengths, self.rows):
            yield each.family()


def _counter(
    name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily:
    made = CounterMetricFamily(name, text, labels=labels)
    for of, count in values:
        made.add_metric(of, count)
    return made
