"""Makes readable errors for disk failures, also if a library drops the operating system's error number."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from blip2edge.errors import OutputError

_NUMBER = re.compile(r"os error (\d+)|\bOs \{ code: (\d+)")  # in the errors of Rust: safetensors, tokenizers
_TEXTS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
}
_NUMPY = re.compile(r"\d+ requested and \d+ written")  # ``tofile`` counts what it wrote, and drops the number
_PROBLEMS = {
    errno.ENOSPC: ("the disk is full", "free space, or give another output directory"),
    errno.EDQUOT: ("the disk is full (quota)", "free space, or give another output directory"),
    errno.EFBIG: ("the file is larger than the limit", "raise the limit (ulimit -f)"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.EIO: ("the disk reports an error", "check the disk, or give an output on another one"),
    errno.EROFS: ("the file system is read-only", "give an output on another one"),
}


def output_error(path: Path, error: BaseException, fix: str = "check the path and its permissions") -> OutputError:
    """Makes the error for an output that could not be written.

    Args:
        path: The output.
        error: The reason.
        fix: What the user can do; for a full disk and other well-known reasons, a more exact text replaces it.
    """
    number = error_number(error)
    if number in _PROBLEMS:
        problem, known_fix = _PROBLEMS[number]
        return OutputError(f"{problem}: {path} could not be written", known_fix)
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return OutputError(f"{path} could not be written ({reason})", fix)


def error_number(error: BaseException) -> int | None:
    """Returns the operating system's number of an error, or of an error that caused it; None if there is no number.

    If an error was raised while another error was handled, the other error may not be its cause. In this case, the
    number of the other error counts only if it means a full disk.
    """
    current: BaseException | None = error
    raised_from = True
    for _ in range(8):
        if current is None:
            return None
        number = getattr(current, "errno", None) or _number_in(str(current))
        if isinstance(number, int) and (raised_from or number in _TEXTS.values()):
            return number
        raised_from = raised_from and current.__cause__ is not None
        current = current.__cause__ or current.__context__
    return None


def disk_is_full(error: BaseException) -> bool:
    """Whether an error comes from a full disk or an exhausted quota."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT)


def _number_in(text: str) -> int | None:
    found = _NUMBER.search(text)
    if found is not None:
        return int(found[1] or found[2])
    if _NUMPY.search(text):
        return errno.ENOSPC
    return next((number for words, number in _TEXTS.items() if words.lower() in text.lower()), None)
