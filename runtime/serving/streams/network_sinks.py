"""Sends captions over the network: to a webhook (``watch --post``) or to an MQTT broker (``watch --mqtt``)."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Collection
from http.client import HTTPException
from typing import Any, NoReturn
from urllib.parse import SplitResult, unquote, urlsplit

from blip2edge.errors import BackendError, UsageError, one_line, option, shown_address
from blip2edge.packages import require
from blip2edge.runtime.serving.streams.queued_sink import (
    TIMEOUT_S,
    CaptionEvent,
    QueuedSink,
    RefusedError,
    Sink,
    SinkOptions,
    TryLaterError,
)

RETRIED = (408, 425, 429)  # HTTP statuses below 500 after which the same request may succeed later

MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}


def _parts(flag: str, url: str, schemes: Collection[str], wanted: str, hint: str) -> SplitResult:
    """Splits the address of a webhook or a broker into its parts, and checks the parts.

    Raises:
        UsageError: The address has another scheme, no host, a wrong port, or spaces before its path.
    """
    wrong = UsageError(f"expected {option(flag)} to be {wanted}, got {shown_address(url)}", hint)
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        if parts.scheme not in schemes or not parts.hostname or parts.port == 0 or re.search(r"\s", parts.netloc):
            raise wrong
    except ValueError as error:  # of the port, of brackets, or of the host's name
        raise wrong from error
    return parts


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes ``urllib`` refuse redirects, which would lose the caption and send the headers to another host."""

    def redirect_request(self, _request: Any, answer: Any, code: int, _: Any, __: Any, to: str) -> NoReturn:
        """Raises RefusedError, whose message has the address of the redirect."""
        answer.close()
        raise RefusedError(f"status {code}: the receiver redirects to {shown_address(to)}; give that address")


def open_webhook(url: str, options: SinkOptions) -> Sink:
    """Makes a sink that sends each caption as ``POST`` with a JSON body.

    Raises:
        UsageError: The address is not http or https, or has a user name or characters that HTTP cannot send.
    """
    bare = re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?(/\S*)?", url)
    hint = f"write http://{url}" if bare else "it begins with http:// or https://; the port is 1 to 65535"
    parts = _parts("post", url, ("http", "https"), "an address http://… or https://…", hint)
    if "@" in parts.netloc:
        raise UsageError(
            f"expected {option('post')} to have no user name and no password, got {shown_address(url)}",
            f"give them as a header: {option('post_header')} 'Authorization: …'",
        )
    if not re.fullmatch(r"[!-~]+", url):
        raise UsageError(
            f"expected {option('post')} to have ASCII characters and no spaces, got {shown_address(url)}",
            "write other characters as %XX, and the host's name as xn--…",
        )
    opener = urllib.request.build_opener(NoRedirects)

    def deliver(event: CaptionEvent) -> None:
        body = json.dumps(event.values).encode()
        headers = {"Content-Type": "application/json", **options.headers}
        try:
            with opener.open(urllib.request.Request(url, body, headers), timeout=TIMEOUT_S) as answer:
                answer.read()
        except urllib.error.HTTPError as error:  # an OSError as well
            with error:
                if error.code < 500 and error.code not in RETRIED:
                    raise RefusedError(f"status {error.code}") from error
            raise TryLaterError(f"answers with status {error.code}") from error
        except HTTPException as error:
            raise ConnectionError(one_line(error)) from error

    return QueuedSink(shown_address(url), deliver, options.report)


class MqttPublisher:
    """Publishes captions to a topic of an MQTT broker with quality of service 1.

    Args:
        url: ``mqtt://[user:password@]host[:port]/topic``, or ``mqtts:`` for TLS.

    Raises:
        UsageError: The address has no host or no topic, a wrong port, or another scheme.
        BackendError: The package paho-mqtt is not installed.
    """

    def __init__(self, url: str) -> None:
        wanted = "mqtt://HOST[:PORT]/TOPIC"
        hint = "the topic has no + and no #, and ? is written as %3F; mqtts:// uses TLS"
        parts = _parts("mqtt", url, MQTT_PORTS, wanted, hint)
        topic = unquote(parts.path.lstrip("/"))
        if not topic or set("+#") & set(topic) or {"#", "?"} & set(url):
            raise UsageError(f"expected {option('mqtt')} to be {wanted}, got {shown_address(url)}", hint)
        require("paho", "publishing by MQTT", BackendError)
        self._parts, self._topic = parts, topic
        self._client: Any = None

    def __call__(self, event: CaptionEvent) -> None:
        """Publishes a caption, and waits until the broker has acknowledged it.

        Raises:
            OSError: The broker cannot be reached, or does not answer in time.
        """
        try:
            client = self._client or self._connected()
            message = client.publish(self._topic, json.dumps(event.values), qos=1)
            message.wait_for_publish(TIMEOUT_S)
            if not message.is_published():
                raise TimeoutError(f"no answer for {TIMEOUT_S:g} s")
        except (OSError, RuntimeError, ValueError) as error:
            self.close()
            if isinstance(error, RuntimeError):  # of paho: the connection is lost
                raise ConnectionError(one_line(error)) from error
            raise

    def close(self) -> None:
        """Closes the connection."""
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def _connected(self) -> Any:
        """Returns a client that is connected to the broker."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        client = Client(CallbackAPIVersion.VERSION2)
        answered, answers = threading.Event(), []

        def on_connect(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
            answers.append(reason)
            answered.set()

        client.on_connect = on_connect
        if self._parts.username is not None:
            client.username_pw_set(unquote(self._parts.username), unquote(self._parts.password or ""))
        if self._parts.scheme == "mqtts":
            client.tls_set()
        client.connect_timeout = TIMEOUT_S
        client.connect(self._parts.hostname or "", self._parts.port or MQTT_PORTS[self._parts.scheme])
        self._client = client
        client.loop_start()
        if not answered.wait(TIMEOUT_S):
            raise TimeoutError(f"no answer for {TIMEOUT_S:g} s")
        if answers[0].is_failure:
            raise ConnectionError(f"the broker refuses the connection: {answers[0]}")
        return client


class MqttSink(QueuedSink):
    """Sends captions to an MQTT broker, in a thread with a queue."""

    def __init__(self, url: str, options: SinkOptions) -> None:
        self._publisher = MqttPublisher(url)
        super().__init__(shown_address(url), self._publisher, options.report)

    def close(self) -> None:
        """Sends the waiting captions for a limited time, then closes the connection; see :meth:`QueuedSink.close`."""
        super().close()
        self._publisher.close()
