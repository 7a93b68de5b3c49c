"""The errors that blip2edge raises on purpose, as one tree.

Each error is one line: what was expected, what was found, and how to correct it.

    Blip2EdgeError
    ├── UsageError              an option or argument is outside its range (exit status 2)
    ├── MissingPackageError     a package that this function needs is not installed
    ├── CheckpointError         a checkpoint directory cannot be read, or does not fit its config
    │   └── UnsupportedModelError   this version does not export the model type
    ├── ConfigError             a training or command configuration file has a wrong key or value
    ├── DataError               a data set cannot be read
    ├── ExportError             a graph cannot be made
    │   └── ParityError         the graph's outputs differ from the checkpoint's
    ├── EngineError             a TensorRT engine cannot be built or does not fit this machine
    ├── ProcessError            another process of a run of several processes has ended
    ├── OutputError             the output exists already, the disk is full, permission is missing
    ├── BundleError             the directory is not a bundle, or lacks what the command needs
    │   ├── BundleVersionError  a newer version wrote the bundle
    │   └── BundleIntegrityError    a file is missing or differs from its recorded hash
    │       └── BundleSignatureError    the required signature is missing, or does not fit key and files
    ├── ImageError              a picture cannot be read
    ├── PromptError             a prompt does not fit the model
    ├── OverloadError           more requests came than the queue holds
    ├── DeadlineError           a caption was not finished in time
    └── BackendError            a backend is not installed or does not run here
        └── EngineFaultError    the graphs fail for every request; the server loads them again

An error's text names options with :func:`option`. Each interface then writes them in its own way: Python
`max_new_tokens`, the command line `--max-new-tokens`, the HTTP server `max_tokens`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    Writer = Callable[[str, bool], str]
    """Writes an option: arguments are its Python name, and whether it is to be switched on."""

_OPTION = re.compile("\x02(\\w+)(=True)?\x03")
_ESCAPE = re.compile("\x1b\\[[0-9;]*[A-Za-z]")  # colours of a terminal
_USER_PASSWORD = re.compile(r"(://(?!\[)[^:/?#@\s]*):(?!\d*[/?#])[^@\s]*(?:@[^/?#@\s]*)*@")
_SECRET = re.compile(
    r"(?<![\w.-])((?:[\w-]*(?:pw|pwd|pass|passwd|password|passphrase)|token|secret|api[-_]?key|authorization)\s*=\s*)"
    r"(?:\(string\)\s*)?(?:\"(?:\\.|[^\"\\])*\"|'[^']*'|[\"'].*|\\.|[^\s\"'\\])+",
    re.IGNORECASE,
)

SHORTEST_HIDDEN = 4
_HIDDEN: set[str] = set()


def option(name: str, *, on: bool = False) -> str:
    """Marks the name of an option in the text of an error, so that each interface can write the name in its own way.

    Args:
        name: The Python name, such as ``max_new_tokens``.
        on: Whether to write the option as switched on: ``force=True`` in Python, ``--force`` on the command line.

    Returns:
        A marked text, which :meth:`Blip2EdgeError.text` replaces.
    """
    return f"\x02{name}=True\x03" if on else f"\x02{name}\x03"


def python_option(name: str, on: bool) -> str:
    """Writes an option as Python does: ``precision``, ``force=True``."""
    return f"{name}=True" if on else name


class Blip2EdgeError(Exception):
    """Root of the errors that blip2edge raises on purpose.

    Args:
        problem: What was expected and what came, without a final full stop.
        fix: What the user can do next; None if nothing helps.
        field: The option that is wrong, by its Python name; by default the first :func:`option` in ``problem``.

    Attributes:
        field: Python name of the wrong option; None if the error is not about an option.
    """

    exit_status = 1

    def __init__(self, problem: str, fix: str | None = None, *, field: str | None = None) -> None:
        self._problem = hidden(" ".join(hidden(problem).split()))
        self._fix = hidden(" ".join(hidden(fix).split())) if fix else None
        found = _OPTION.search(self._problem)
        self.field = field if field is not None or found is None else found[1]
        super().__init__(self.text())

    @property
    def problem(self) -> str:
        """What was expected and what was found."""
        return _written(self._problem, python_option)

    @property
    def fix(self) -> str | None:
        """What the user can do about the error; None if nothing helps."""
        return None if self._fix is None else _written(self._fix, python_option)

    def with_problem(self, change: Callable[[str], str]) -> Self:
        """Returns an error of the same class, with the same advice, whose problem was changed by a function."""
        return type(self)(change(self._problem), self._fix, field=self.field)

    def text(self, write: Writer = python_option) -> str:
        """Returns the whole error in one line.

        Args:
            write: Function that writes the name of each option in the error.
        """
        whole = self._problem if self._fix is None else f"{self._problem}; {self._fix}"
        return _written(whole, write)


def _written(text: str, write: Writer) -> str:
    return _OPTION.sub(lambda found: write(found[1], found[2] is not None), text)


class Blip2EdgeWarning(UserWarning):
    """Root of the warnings that blip2edge gives on purpose; the command line prints them as notes.

    Args:
        text: The warning, in one line; it may name options with :func:`option`.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        super().__init__(self.text())

    def text(self, write: Writer = python_option) -> str:
        """Returns the warning; ``write`` writes the name of each option in it."""
        return _written(self._text, write)


class WithoutEffectWarning(Blip2EdgeWarning):
    """An option has no effect together with the other options."""


class UsageError(Blip2EdgeError):
    """An option or argument is outside its range."""

    exit_status = 2


class MissingPackageError(Blip2EdgeError, ImportError):
    """A package that this function needs is not installed."""


class CheckpointError(Blip2EdgeError):
    """A checkpoint cannot be read, or its tensors do not fit its config."""


class UnsupportedModelError(CheckpointError):
    """This version does not export the checkpoint's model type."""


class ConfigError(Blip2EdgeError):
    """A configuration file has a wrong key or value."""


class DataError(Blip2EdgeError):
    """A data set cannot be read."""


class ExportError(Blip2EdgeError):
    """A graph cannot be made."""


class ParityError(ExportError):
    """The graph's outputs differ from the checkpoint's."""


class EngineError(Blip2EdgeError):
    """An engine cannot be built, or does not fit this machine."""


class ProcessError(Blip2EdgeError):
    """Another process of a run of several processes has ended."""


class OutputError(Blip2EdgeError):
    """The output cannot be written: it exists already, the disk is full, or permission is missing."""


class BundleError(Blip2EdgeError):
    """The directory is not a bundle, or lacks what the command needs."""


class BundleVersionError(BundleError):
    """A newer version of blip2edge wrote the bundle."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, or differs from its recorded hash."""


class BundleSignatureError(BundleIntegrityError):
    """The required signature of a bundle is missing, is of another key, or lists other files."""


class ImageError(Blip2EdgeError):
    """A picture cannot be read."""


class PromptError(Blip2EdgeError):
    """A prompt does not fit the model."""


class OverloadError(Blip2EdgeError):
    """More requests came than the queue holds."""


class DeadlineError(Blip2EdgeError):
    """A caption was not finished in time."""


class BackendError(Blip2EdgeError):
    """A backend is not installed, or does not run on this machine."""


class EngineFaultError(BackendError):
    """The graphs fail for every request, also for one that is known to be good."""

    def __init__(self) -> None:
        super().__init__("the engine has failed and is being loaded again", "try again later")


def one_line(error: BaseException) -> str:
    """Returns the message of an exception in one line of at most 200 characters; its class if the message is empty.

    Passwords in the message are replaced as in :func:`shown_address`.
    """
    text = shown_address(" ".join(_ESCAPE.sub("", hidden(str(error))).split())) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def some(names: Sequence[str], limit: int = 3) -> str:
    """Joins the first ``limit`` names for a message, and adds how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def plural(count: int, one: str) -> str:
    """Formats a number with its noun: ``1 picture``, ``2 pictures``.

    Args:
        count: The number.
        one: The noun in the singular, whose plural ends in s.
    """
    return f"{count} {one}{'' if count == 1 else 's'}"


def shown_address(address: str) -> str:
    """Replaces passwords by ``***`` in an address, a GStreamer pipeline or a message, before it is printed.

    Passwords are the password of ``scheme://user:password@host``, the values of properties and parameters such as
    ``user-pw=``, ``passphrase=``, ``password=`` and ``token=``, and everything that was given to :func:`hide`.
    """
    return hidden(_SECRET.sub(r"\1***", _USER_PASSWORD.sub(r"\1:***@", address)))


def hide(secret: str) -> None:
    """Hides a text from now on in errors, addresses and messages. A text of fewer than four characters is not hidden.

    Two variants of the text are hidden too: with single spaces, as in errors of one line, and escaped, as in ``repr``.
    """
    forms = {secret, " ".join(secret.split()), repr(secret)[1:-1]}
    _HIDDEN.update(form for form in forms if len(form) >= SHORTEST_HIDDEN)


def hidden(text: str) -> str:
    """Returns a text with ``***`` in place of everything that was given to :func:`hide`."""
    for secret in sorted(_HIDDEN, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def shown(value: Any) -> str:
    """Formats a value for an error message, with at most 80 characters."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python itself refuses to write very long ones
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
