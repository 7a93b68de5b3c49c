"""The bundles that a server has loaded; each has a captioner or a matcher, a queue of requests, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle, load_whole
from blip2edge.bundle.schema import TEXT_EMBEDS, BackendName
from blip2edge.errors import PromptError, UsageError, option, shown
from blip2edge.limits import Limits
from blip2edge.runtime.backends.base import check_threads
from blip2edge.runtime.backends.probe import cores
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import FairLock
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.captioning.request import Pending, Request
from blip2edge.runtime.captioning.restart import Backoff, RestartingCaptioner
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.serving.chat_keys import RequestError
from blip2edge.runtime.serving.metrics import Metrics, ModelMetrics
from blip2edge.runtime.serving.models.match_queue import MatchCall, MatchQueue, Steps
from blip2edge.runtime.serving.transfer import WaitingClient
from blip2edge.runtime.text.prompt import Dialog, PromptText

Loaded = Captioner | Matcher


@dataclass(frozen=True)
class ModelSource:
    """A bundle for the server.

    Attributes:
        loaded: The loaded bundle.
        load: Function that loads the bundle again if its engine is broken. If None, the bundle is not loaded again.
        name: Name of the model in requests. If empty, the name of the bundle's directory is used.
    """

    loaded: Captioner | Matcher
    load: Callable[[], Any] | None = None
    name: str = ""

    @property
    def model(self) -> str:
        """Returns the model's name in requests."""
        return self.name or self.loaded.bundle.path.resolve().name


@dataclass(frozen=True)
class Queueing:
    """The settings of each bundle's queue of requests.

    Attributes:
        max_batch, max_waiting: As in :class:`Scheduler`.
        deadline: Time limit in seconds for a request that sets no limit; None for no limit.
        limits: The largest request.
        backoff: The waiting times between attempts to load an engine again.
    """

    max_batch: int = 8
    max_waiting: int = 64
    deadline: float | None = None
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    backoff: Backoff = Backoff()  # noqa: RUF009 - frozen


def load_served(
    bundle: str | Path,
    *,
    backend: BackendName,
    threads: int | None,
    limits: Limits,
    require_signature: Path | None,
    queries: int | None = None,
) -> Loaded:
    """Loads a bundle as a captioner, or as a matcher if the bundle is for retrieval; see :meth:`Captioner.load`.

    ``queries``: for a bundle with an elastic bridge, the number of visual tokens of each picture in requests that do
    not set this number.

    Raises:
        UsageError: ``queries`` is given for a matcher; or for the reasons in :meth:`Captioner.load`.
    """
    check_threads(threads)

    def load(opened: Bundle) -> Loaded:
        if TEXT_EMBEDS in opened.manifest.graphs:
            if queries is not None:
                raise UsageError(
                    f"{opened.path} does not take {option('queries')}: it compares pictures with texts",
                    f"leave {option('queries')} out, or serve this bundle in a process of its own",
                )
            return Matcher(opened, backend, threads, limits)
        return Captioner(opened, backend, threads, limits=limits, queries=queries)

    return load_whole(bundle, load, require_signature=require_signature)


class ServedModel:
    """A loaded bundle of a server.

    Attributes:
        name: Name of the model in requests.
        engine: The loaded bundle with its queue of requests; if the bundle fails, it is loaded again.
        metrics: The metrics of this bundle.
        captions: Whether the bundle captions pictures.
    """

    captions = False
    engine: RestartingCaptioner | MatchQueue
    metrics: ModelMetrics

    def __init__(self, source: ModelSource, queueing: Queueing) -> None:
        self.name, self.queueing = source.model, queueing
        self._written = int((source.loaded.bundle.path / "bundle.json").stat().st_mtime)

    @property
    def load(self) -> Mapping[str, int]:
        """Returns the number of requests in each queue."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """Returns the JSON object that describes the bundle in the answer of ``/v1/models``."""
        about = {"created": self._written, "owned_by": "blip2edge", "captions": self.captions}
        return {"id": self.name, "object": "model", **about}

    def health(self) -> dict[str, Any]:
        """Returns the JSON object that describes the bundle's state in the answer of ``/health``."""
        return {"status": self.engine.state, "model": self.name, "load": self.load}

    def counted(self, pending: Pending[Any]) -> None:
        """Counts a finished request in the metrics, and records that the engine works."""
        if isinstance(pending, Request):
            self.metrics.add_caption(pending)
        else:
            self.metrics.add_call(pending)
        self.engine.succeeded()


class ServedCaptioner(ServedModel):
    """A bundle that captions pictures."""

    captions = True
    engine: RestartingCaptioner

    def __init__(
        self, source: ModelSource, captioner: Captioner, queueing: Queueing, lock: FairLock | None, metrics: Metrics,
        label: str | None,
    ) -> None:  # fmt: skip
        super().__init__(source, queueing)
        self.metrics = ModelMetrics(metrics, label, lambda: self.load, lambda: self.engine.restarts)
        self.engine = RestartingCaptioner(
            captioner,
            source.load,
            queueing.backoff,
            max_batch=queueing.max_batch,
            max_waiting=queueing.max_waiting,
            graph_lock=lock,
            trace=self.metrics.add_span,
        )

    @property
    def captioner(self) -> Captioner:
        """Returns the captioner in use; after the bundle was loaded again, this is a new captioner."""
        return self.engine.captioner

    @property
    def load(self) -> Mapping[str, int]:
        """Returns the number of requests in each queue."""
        return self.engine.scheduler.load

    def submit(
        self,
        client: WaitingClient[Request],
        pictures: tuple[bytes, ...],
        prompt: PromptText | None,
        options: Mapping[str, Any],
        deadline: float | None,
    ) -> None:
        """Adds a client's pictures to the queue, as one request for a caption.

        Raises:
            EngineFaultError, OverloadError: The request cannot be served now.
            UsageError, PromptError: The request exceeds a limit, or an option is outside its range.
        """
        scheduler = self.engine.ready()
        self._check_limits(pictures, prompt, options)
        stop = options.get("stop")
        if isinstance(stop, list):  # besides those of the bundle's template
            options = {**options, "stop": [*self.captioner.options().stop, *stop]}
        client.pending = scheduler.submit(
            pictures[0] if len(pictures) == 1 else list(pictures),
            self._limited(self.captioner.options(**options)),
            prompt=prompt,
            deadline=self.queueing.deadline if deadline is None else deadline,
            wait=False,
            on_piece=client.put,
        )

    def _check_limits(self, pictures: tuple[bytes, ...], prompt: PromptText | None, options: Mapping[str, Any]) -> None:
        limits = self.queueing.limits
        for name, most in (("num_beams", limits.beams), ("max_new_tokens", limits.new_tokens)):
            value = options.get(name)
            if isinstance(value, int) and value > most:
                raise UsageError(f"expected {option(name)} of at most {most}, got {shown(value)}")
        if len(pictures) > limits.pictures:
            raise RequestError(f"expected at most {limits.pictures} pictures, got {len(pictures)}", "send fewer")
        length = sum(map(len, prompt.texts if isinstance(prompt, Dialog) else [prompt or ""]))
        if length > limits.prompt_chars:
            raise PromptError(
                f"expected a prompt of at most {limits.prompt_chars} characters, got {length}", "shorten the prompt"
            )

    def _limited(self, options: GenerationOptions) -> GenerationOptions:
        """Returns the options with ``max_new_tokens`` and ``min_new_tokens`` lowered to the server's limit."""
        most = self.queueing.limits.new_tokens
        if options.max_new_tokens <= most:
            return options
        return replace(options, max_new_tokens=most, min_new_tokens=min(options.min_new_tokens, most))


class ServedMatcher(ServedModel):
    """A bundle for retrieval: compares pictures with texts, and embeds pictures and texts."""

    engine: MatchQueue

    def __init__(
        self, source: ModelSource, matcher: Matcher, queueing: Queueing, lock: FairLock | None, metrics: Metrics,
        label: str | None,
    ) -> None:  # fmt: skip
        super().__init__(source, queueing)
        self.engine = MatchQueue(
            matcher, source.load, queueing.backoff, max_waiting=queueing.max_waiting, graph_lock=lock
        )
        self.metrics = ModelMetrics(metrics, label, lambda: self.load, lambda: self.engine.restarts)

    @property
    def load(self) -> Mapping[str, int]:
        """Returns the number of requests in each queue."""
        return self.engine.load

    def submit(self, client: WaitingClient[MatchCall], steps: Steps, inputs: list[Any], deadline: float | None) -> None:
        """Adds a client's request to the queue; ``steps`` computes it, and ``inputs`` are its pictures and texts.

        Raises:
            EngineFaultError, OverloadError: The request cannot be served now.
            UsageError: The deadline is outside its range.
        """
        client.pending = self.engine.ready().submit(
            steps, inputs, deadline=self.queueing.deadline if deadline is None else deadline, on_piece=client.put
        )


class ServedModels:
    """All bundles of a server.

    Args:
        sources: The bundles, at least one; their names must differ.
        queueing: The settings of each bundle's queue.
        bodies: Returns the total bytes of the bodies of open requests, for the metrics.

    Attributes:
        metrics: Metrics of the server.

    Raises:
        UsageError: Two bundles have the same name.
    """

    def __init__(self, sources: Sequence[ModelSource], queueing: Queueing, bodies: Callable[[], int]) -> None:
        names = [source.model for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"two bundles have the name {name!r}", f"name one of them: {name}-2=BUNDLE")
        several = len(sources) > 1
        self.metrics = Metrics(bodies, several=several)
        lock = shared_lock([source.loaded for source in sources]) if several else None
        self._models: dict[str, ServedModel] = {}
        for source in sources:
            loaded = source.loaded
            own, label = lock if loaded.graphs.host_threads else None, source.model if several else None
            self._models[source.model] = (
                ServedCaptioner(source, loaded, queueing, own, self.metrics, label)
                if isinstance(loaded, Captioner)
                else ServedMatcher(source, loaded, queueing, own, self.metrics, label)
            )
        self.metrics.models += [model.metrics for model in self]

    def __iter__(self) -> Iterator[ServedModel]:
        """Yields the bundles, in the order in which they were given."""
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def by_name(self, name: str) -> ServedModel:
        """Returns the bundle with this name.

        Raises:
            RequestError: There is no such bundle (status 404).
        """
        if name not in self._models:
            has = "this server has one" if len(self) == 1 else "this server has"
            raise RequestError(
                f"there is no model {name!r}",
                f"{has}: {', '.join(self._models)}",
                field="model",
                code="model_not_found",
                status=404,
            )
        return self._models[name]

    def captioner(self, name: str | None) -> ServedCaptioner:
        """Returns the bundle that captions a request's pictures.

        Args:
            name: Name of the model; None for the first bundle that captions. A server of one bundle accepts any name.

        Raises:
            RequestError: There is no such bundle, or the bundle captions no pictures.
        """
        model = self._chosen(name, ServedCaptioner)
        if isinstance(model, ServedCaptioner):
            return model
        raise RequestError(
            f"the model {model.name!r} compares pictures with texts and cannot caption them",
            "use /match or /v1/embeddings",
            field="model",
            code="unsupported_model",
        )

    def matcher(self, name: str | None) -> ServedMatcher:
        """Returns the bundle for a request for retrieval; arguments and errors as in :meth:`captioner`."""
        model = self._chosen(name, ServedMatcher)
        if isinstance(model, ServedMatcher):
            return model
        raise RequestError(
            f"the model {model.name!r} captions pictures: it has no embeddings and compares no texts",
            "use /caption, or serve a bundle for retrieval as well (BLIP-2 ITM, BLIP ITM or CLIP)",
            field="model",
            code="unsupported_model",
        )

    def _chosen(self, name: str | None, kind: type[ServedModel]) -> ServedModel:
        if name is not None and len(self) > 1:
            return self.by_name(name)
        able = [model for model in self if isinstance(model, kind)]
        first: ServedModel = (able or list(self))[0]
        return first

    def health(self) -> dict[str, Any]:
        """Returns the JSON answer of ``/health``; if there are several bundles, ``models`` has an object for each."""
        each = [model.health() for model in self]
        if len(each) == 1:
            return each[0]
        broken = [one["status"] for one in each if one["status"] != "ok"]
        status = "failed" if "failed" in broken else "restarting" if broken else "ok"
        return {"status": status, "models": each}

    def close(self) -> None:
        """Cancels all open requests."""
        for model in self:
            model.engine.close()


def shared_lock(loaded: Sequence[Loaded]) -> FairLock | None:
    """Returns one lock for all bundles if their graphs, running together, would use more threads than there are cores.

    If there are enough cores, returns None. A captioner runs up to two graphs at once (in its encoding and decoding
    threads); a matcher runs one graph at a time.
    """
    threads = sum(one.graphs.host_threads * (2 if isinstance(one, Captioner) else 1) for one in loaded)
    return FairLock() if threads > cores() else None
