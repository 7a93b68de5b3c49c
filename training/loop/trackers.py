"""Sends the values of a training run to trackers: TensorBoard, Weights & Biases and all other trackers of accelerate.

The trackers get the values of every line of the log: losses, learning rate, scores of validations, and values of the
phase such as its temperature (gauges). A value is named ``PHASE/NAME``. Steps are counted over all phases: a phase
begins at the sum of the ``steps`` of the earlier phases. No steps are missing between two phases, because only the last
phase can end early (``patience``). A resumed run continues at the step of its snapshot.

A tracker that fails while the run trains does not end the run: the log in the directory of the run has all values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.locks import write_file
from blip2edge.errors import ConfigError, DataError, one_line
from blip2edge.packages import EXTRAS, install_command
from blip2edge.reading import read_text
from blip2edge.training.config import TrainingConfig

BOARD = "tensorboard"
"""Name of the directory for TensorBoard's event files, inside the directory of the run."""

IDENTITY = "tracked-run"
"""File with the run's id in the directory of the run, so that a resumed run continues the tracker's run."""

_ID_BYTES = 8


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """The values with which a tracker is started.

    Attributes:
        directory: Directory of the run.
        project: Name of the project that the run belongs to.
        name: Name of the run.
        identity: Id of the run; a resumed run keeps the id.
        first_step: Step of the snapshot that the run resumes from, counted over all phases; 0 in a new run.
    """

    directory: Path
    project: str
    name: str
    identity: str
    first_step: int


def _tensorboard(run: TrackedRun) -> dict[str, Any]:
    # A killed run has written steps behind its snapshot. TensorBoard hides those from this step on.
    return {"logging_dir": str(run.directory), "purge_step": run.first_step + 1}


def _wandb(run: TrackedRun) -> dict[str, Any]:
    # W&B keeps the steps behind the snapshot, which is right: a resumed run gives the same values again.
    return {"name": run.name, "id": run.identity, "resume": "allow"}


STARTS: Mapping[str, Callable[[TrackedRun], dict[str, Any]]] = {"tensorboard": _tensorboard, "wandb": _wandb}
"""For each tracker that can continue a resumed run: a function that makes the arguments of accelerate's tracker class.

The name of the project is not among these arguments.
"""


def check_trackers(names: Sequence[str]) -> None:
    """Checks that accelerate knows the trackers, and that their packages are installed. Call it on every process.

    Raises:
        ConfigError: A tracker is unknown to accelerate, or its package is not installed.
    """
    installed = set(map(str, get_available_trackers()))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"[loop] trackers: {name!r} is not one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}",
                "name trackers that the package accelerate has",
            )
        if name in LoggerType.list() and name not in installed:
            raise ConfigError(
                f"[loop] trackers: {name} needs the package {name}, which is not installed",
                install_command(EXTRAS[name]) if name in EXTRAS else f"pip install {name}",
            )


class Trackers:
    """Starts the trackers of one run, sends values to them, and ends them.

    Args:
        names: Names of trackers, checked by :func:`check_trackers`.
        run: The run.
        config: The values of the recipe by ``section.key``; recorded when the run begins.
        log: Receives one line about each tracker that fails after its start.

    Raises:
        ConfigError: A tracker cannot be started.
    """

    def __init__(
        self, names: Sequence[str], run: TrackedRun, config: Mapping[str, Any], log: Callable[[str], None]
    ) -> None:
        self._open: dict[str, Any] = {}
        self._log = log
        self._failed: set[str] = set()
        for name in names:
            try:
                starts = STARTS[name](run) if name in STARTS else {}
                project = BOARD if name == "tensorboard" else run.project  # of TensorBoard: its directory
                tracker = LOGGER_TYPE_TO_CLASS[name](project, **starts)
                tracker.start()
                self._open[name] = tracker
                if not run.first_step:
                    tracker.store_init_configuration(dict(config))
            except Exception as error:
                self.close()
                raise ConfigError(
                    f"[loop] trackers: {name} does not start: {type(error).__name__}: {one_line(error)}",
                    f"set up {name} (for wandb: wandb login, or the environment variable WANDB_MODE=offline), or take"
                    " it out of trackers",
                ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends values by name to every tracker. A tracker that failed before still gets the new values.

        Args:
            values: The values.
            step: Number of the step, counted over all phases.
        """
        for name, tracker in self._open.items():
            with self._guarded(name):
                tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Ends all trackers, which first write their remaining values. If a tracker fails, the others are ended too."""
        while self._open:
            name, tracker = self._open.popitem()
            with self._guarded(name):
                tracker.finish()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Catches the errors of a tracker in a ``with`` block: logs the first error, and ignores later errors."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each package has errors of its own
            if name not in self._failed:
                self._failed.add(name)
                self._log(
                    f"[loop] trackers: {name} fails: {type(error).__name__}: {one_line(error)}; the run goes on, and"
                    f" {name} may lack values that the log of the run has"
                )


def run_identity(directory: Path, *, resumed: bool) -> str:
    """Returns the id of a run. A resumed run keeps the id in the file :data:`IDENTITY`; a new run writes a new id.

    Raises:
        DataError: The file cannot be read.
        OutputError: The file cannot be written.
    """
    path = directory / IDENTITY
    if resumed and path.is_file():
        return read_text(path, DataError, f"remove {path}").strip()
    identity = secrets.token_hex(_ID_BYTES)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_file(path, f"{identity}\n".encode())
    except OSError as error:
        raise output_error(path, error) from error
    return identity


def recipe_values(config: TrainingConfig) -> dict[str, Any]:
    """Returns a recipe's values by ``section.key``; lists become texts, because trackers need numbers or texts."""
    return _flat(dataclasses.asdict(config), "")


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
