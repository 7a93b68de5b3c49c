"""Turns the exceptions of ``huggingface_hub`` into errors of one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blip2edge.bundle.outputs.disk_errors import disk_is_full, output_error
from blip2edge.errors import Blip2EdgeError, one_line

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_NETWORK = ("ConnectError", "TimeoutException", "ConnectionError", "NetworkError", "RemoteProtocolError", "ProxyError")
_Texts = tuple[str, str]

# Class of the exception -> problem and fix; the first that fits. {} is the repository.
_BY_CLASS: tuple[tuple[str, _Texts], ...] = (
    ("GatedRepoError", ("{} is gated, and this account has no access", "ask for access on its page, and " + LOG_IN)),
    (
        "RepositoryNotFoundError",
        ("there is no repository {} on the hub, or it is private", f"check the name; for a private one {LOG_IN}"),
    ),
    ("DisabledRepoError", ("the hub has disabled {}", "use another repository")),
    ("RevisionNotFoundError", ("{} has no such revision", "give a branch, a tag or a commit of the repository")),
    ("HFValidationError", ("{} is not the name of a repository", "give it as ORG/NAME")),
)


@contextmanager
def hub_errors(
    what: str, repository: str, kind: type[Blip2EdgeError], place: Path | None = None, advice: str = ""
) -> Iterator[None]:
    """Turns every exception that the hub's client raises in the block into an error of this project.

    Args:
        what: What failed; the error begins with it.
        repository: ``ORG/NAME``.
        kind: Class of the error.
        place: Directory that the block writes to; the error of a full disk names it.
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
        problem, fix = _texts(error, repository, advice)
        raise kind(f"{what}: {problem}", fix) from error


@contextmanager
def quiet_client() -> Iterator[None]:
    """Hides the warnings of the hub's client in the block; the client warns at each new attempt to connect."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _texts(error: BaseException, repository: str, advice: str) -> _Texts:
    """Returns two texts for an exception of the hub's client: what went wrong, and what the user can do."""
    chain = list(_causes(error))
    classes = {one.__name__ for each in chain for one in type(each).__mro__}
    for name, (problem, fix) in _BY_CLASS:
        if name in classes:
            return problem.format(repository), fix
    if "OfflineModeIsEnabled" in classes:
        return f"{repository} is not in the hub's cache, and HF_HUB_OFFLINE is set", "unset it, and run again"
    status = next((code for each in chain if (code := _status(each))), 0)
    if status in _BY_STATUS:
        problem, fix = _BY_STATUS[status](repository)
        return problem, fix
    if status:
        return f"the hub answered with status {status} ({one_line(error)})", "try again later"
    if classes & set(_NETWORK):
        reason = one_line(chain[-1])
        return f"the hub cannot be reached ({reason})", advice or "check the network, and HF_ENDPOINT if it is set"
    if "LocalEntryNotFoundError" in classes:
        return f"the hub cannot be reached ({one_line(error)})", advice or "check the network"
    reason = one_line(error) if len(chain) == 1 else f"{one_line(error)} ({one_line(chain[-1])})"
    return reason, advice or "try again"


_BY_STATUS: dict[int, Callable[[str], _Texts]] = {
    401: lambda repository: (f"the hub does not accept this token for {repository}", LOG_IN),
    403: lambda repository: (f"this account has no permission for {repository}", LOG_IN + " with another account"),
    404: lambda repository: (f"there is no repository {repository} on the hub", "check the name"),
    429: lambda _: ("the hub received too many requests", "try again in a few minutes, or " + LOG_IN),
}


def is_answer(error: BaseException) -> bool:
    """Whether the hub answered with an error such as status 404; False if the hub could not be reached."""
    return any(_status(one) for one in _causes(error))


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the exception, then the exceptions that it was raised from."""
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
