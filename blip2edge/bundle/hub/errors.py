"""Turns the exceptions of ``huggingface_hub`` into errors of one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from importlib import import_module
from pathlib import Path

from blip2edge.bundle.hub.names import MAIN, HubName
from blip2edge.bundle.outputs.disk_errors import disk_is_full, output_error
from blip2edge.errors import Blip2EdgeError, one_line

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_NETWORK = ("ConnectError", "TimeoutException", "ConnectionError", "NetworkError", "RemoteProtocolError", "ProxyError")
_Texts = tuple[str, str]

# Class of the exception -> problem and fix; the first that fits. The two {} are the repository and the revision.
_BY_CLASS: tuple[tuple[str, _Texts], ...] = (
    ("GatedRepoError", ("{} is gated, and this account has no access", "ask for access on its page, and " + LOG_IN)),
    (
        "RepositoryNotFoundError",
        ("there is no repository {} on the hub, or it is private", f"check the name; for a private one {LOG_IN}"),
    ),
    ("DisabledRepoError", ("the hub has disabled {}", "use another repository")),
    ("RevisionNotFoundError", ("{} has no revision {}", "give a branch, a tag or a commit of the repository")),
    ("HFValidationError", ("{} is not the name of a repository", "give it as ORG/NAME")),
)
_ADDRESS = ("UnsupportedProtocol", "InvalidURL", "LocalProtocolError")
_LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_FILE = re.compile(r"/resolve/[^/]+/([^?]+)")


@contextmanager
def hub_errors(
    what: str, name: HubName, kind: type[Blip2EdgeError], place: Path | None = None, advice: str = ""
) -> Iterator[None]:
    """Turns every exception that the hub's client raises in the block into an error of this project.

    Args:
        what: What failed; the error begins with it.
        name: The repository and its revision.
        kind: Class of the error.
        place: Directory that the block writes to, the hub's cache; None for no directory. The errors of a full disk and
            of a directory that cannot be written name it.
        advice: What the user can do about a lost connection; empty for the usual advice.

    Raises:
        OutputError: The disk is full. ``kind`` is raised for every other exception.
    """
    try:
        with quiet_client():
            yield
    except Blip2EdgeError:
        raise
    except Exception as error:  # the client raises its own exceptions, httpx' and those of the system
        if place is not None and disk_is_full(error):
            raise output_error(place, error) from error
        problem, fix = _unwritable(error, place) or _texts(error, name, advice)
        raise kind(f"{what}: {problem}", fix) from error


@contextmanager
def quiet_client() -> Iterator[None]:
    """Hides the warnings and the progress bars of the hub's client in the block.

    The client warns at each new attempt to connect. The environment variable ``HF_HUB_DISABLE_PROGRESS_BARS=0`` keeps
    its bars.
    """
    try:
        bars = import_module("huggingface_hub.utils")  # its import sets the level of the log
        keep = import_module("huggingface_hub.constants").HF_HUB_DISABLE_PROGRESS_BARS is not None
    except ImportError:
        yield
        return
    log = logging.getLogger("huggingface_hub")
    level, keep = log.level, keep or bars.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    if not keep:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not keep:
            bars.enable_progress_bars()


def _unwritable(error: BaseException, place: Path | None) -> _Texts | None:
    """Returns two texts for an error of the file system: what went wrong, and what the user can do.

    The result is None for any other exception.
    """
    found = next((one for one in _causes(error) if isinstance(one, OSError) and one.errno and one.filename), None)
    if found is None:
        return None
    reason = f"{found.filename}: {found.strerror}"
    if place is None:
        return reason, "check the path and its permissions"
    return f"the hub's cache {place} cannot be used ({reason})", "set HF_HOME to a folder that can be written"


def _texts(error: BaseException, name: HubName, advice: str) -> _Texts:
    """Returns two texts for an exception of the hub's client: what went wrong, and what the user can do."""
    chain, repository = list(_causes(error)), name.repository
    classes = {one.__name__ for each in chain for one in type(each).__mro__}
    for kind, (problem, fix) in _BY_CLASS:
        if kind in classes:
            return problem.format(repository, name.revision), fix
    if "OfflineModeIsEnabled" in classes:
        revision = "" if name.revision == MAIN else f"@{name.revision}"
        return f"{repository}{revision} is not in the hub's cache, and HF_HUB_OFFLINE is set", "unset it, and run again"
    answer = next((each for each in chain if _status(each)), None)
    if answer is not None:
        return _of_status(answer, repository)
    if classes & set(_ADDRESS):
        reason = one_line(chain[-1])
        return f"the address of the hub is wrong ({reason})", "set HF_ENDPOINT to an address with https://, or unset it"
    if classes & set(_NETWORK):
        reason = one_line(chain[-1])
        return f"the hub cannot be reached ({reason})", advice or "check the network, and HF_ENDPOINT if it is set"
    if "LocalEntryNotFoundError" in classes:
        return f"the hub cannot be reached ({one_line(error)})", advice or "check the network"
    first, last = one_line(error), one_line(chain[-1])
    return first if first == last else f"{first} ({last})", advice or "try again"


def _of_status(error: BaseException, repository: str) -> _Texts:
    """Returns two texts for an error status of the hub: what went wrong, and what the user can do."""
    status = _status(error)
    if type(error).__name__ in ("RemoteEntryNotFoundError", "EntryNotFoundError"):
        file = _FILE.search(str(getattr(getattr(error, "response", None), "url", "")))
        return f"{repository} has no file {file[1] if file else 'of this name'}", "check the name of the repository"
    if status in _BY_STATUS:
        return _BY_STATUS[status](repository)
    phrase = next((f" ({known.phrase})" for known in HTTPStatus if known == status), "")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"the hub has a problem: it answered with status {status}{phrase}", "try again in a few minutes"
    return f"the hub answered with status {status}{phrase}", "try again later"


_BY_STATUS: dict[int, Callable[[str], _Texts]] = {
    401: lambda repository: (f"the hub does not accept this token for {repository}", LOG_IN),
    403: lambda repository: (f"this account has no permission for {repository}", LOG_IN + " with another account"),
    404: lambda repository: (
        f"the hub has nothing for {repository} at this address (status 404)",
        "check the name, and HF_ENDPOINT if it is set",
    ),
    429: lambda _: ("the hub received too many requests", "try again in a few minutes, or " + LOG_IN),
}


def is_answer(error: BaseException) -> bool:
    """Whether the hub answered with an error about the request, such as status 404.

    False if the hub could not be reached, or if the same request may be answered later (status 408, 429 or 500 and
    above).
    """
    status = next((code for each in _causes(error) if (code := _status(each))), 0)
    return 0 < status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _LATER


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the exception, then the exceptions that it was raised from."""
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
