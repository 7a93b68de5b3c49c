"""What can go wrong, as one tree.

Every error that a user can cause is told in one line: what was expected, what came, and what mends it.

    Blip2EdgeError
    ├── UsageError              an option, flag or argument outside its range (exit status 2)
    ├── CheckpointError         a checkpoint directory that cannot be read, or does not fit its config
    │   └── UnsupportedModelError   a model type that this version does not export
    ├── ConfigError             a training or command configuration file with a wrong key or value
    ├── DataError               a data set that cannot be read
    ├── ExportError             a graph that could not be made
    │   └── ParityError         a graph that was made and does not answer as the checkpoint does
    ├── EngineError             a TensorRT engine that cannot be built or does not fit this machine
    ├── OutputError             an output directory that exists, a full disk, no permission
    ├── BundleError             a bundle that is no bundle, or lacks what the command needs
    │   ├── BundleVersionError  written by a newer version
    │   └── BundleIntegrityError    a file that is missing or differs from its recorded hash
    ├── ImageError              a picture that cannot be read
    ├── PromptError             a prompt that does not fit the model
    ├── OverloadError           more requests than the queue holds
    ├── DeadlineError           a caption that was not done in time
    └── BackendError            a backend that is not installed or does not run here
"""

from __future__ import annotations


class Blip2EdgeError(Exception):
    """Root of the errors raised on purpose.

    Args:
        problem: What was expected and what came, without a final full stop.
        fix: What the user can type or do next; omitted where nothing helps.
    """

    exit_status = 1

    def __init__(self, problem: str, fix: str | None = None) -> None:
        self.problem = " ".join(problem.split())
        self.fix = " ".join(fix.split()) if fix else None
        super().__init__(self.problem if self.fix is None else f"{self.problem}; {self.fix}")


class UsageError(Blip2EdgeError):
    """An option, flag or argument is outside its range."""

    exit_status = 2


class CheckpointError(Blip2EdgeError):
    """A checkpoint cannot be read, or its tensors do not fit its config."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint's model type is not one that this version exports."""


class ConfigError(Blip2EdgeError):
    """A configuration file has a wrong key or value."""


class DataError(Blip2EdgeError):
    """A data set cannot be read."""


class ExportError(Blip2EdgeError):
    """A graph could not be made."""


class ParityError(ExportError):
    """A graph was made, but does not answer as the checkpoint does."""


class EngineError(Blip2EdgeError):
    """An engine cannot be built, or does not fit this machine."""


class OutputError(Blip2EdgeError):
    """The output cannot be written: it exists, the disk is full, permission is missing."""


class BundleError(Blip2EdgeError):
    """The directory is no bundle, or lacks what the command needs."""


class BundleVersionError(BundleError):
    """The bundle was written by a newer version than this one."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, or differs from its recorded hash."""


class ImageError(Blip2EdgeError):
    """A picture cannot be read."""


class PromptError(Blip2EdgeError):
    """A prompt does not fit the model."""


class OverloadError(Blip2EdgeError):
    """More requests came than the queue holds."""


class DeadlineError(Blip2EdgeError):
    """A caption was not done within its deadline."""


class BackendError(Blip2EdgeError):
    """A backend is not installed, or does not run on this machine."""


def one_line(error: BaseException) -> str:
    """An exception's message in one line of at most 200 characters; its class where the message is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
