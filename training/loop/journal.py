"""Writes the log of a training run: JSON lines, values for trackers such as TensorBoard, and a plot of the losses."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.locks import write_file
from blip2edge.errors import DataError, OutputError
from blip2edge.reading import parse_json, read_text, reading
from blip2edge.training.loop.trackers import Trackers

LOG, CURVE = "log.jsonl", "curve.png"
WHOLE = ("loss", "grad_norm")  # values that are fields of a line, not entries of `losses`
LINES = 200  # approximate number of lines of a phase, unless the recipe sets log_every


class Journal:
    """Writes the log of one run: one line for each interval of steps.

    A line is an object with `phase`, `step` (steps done), `losses` by name, `loss` (the minimised sum) and `grad_norm`
    (means over the interval and over the processes), `rate` (learning rate), `gauges` (values of the phase, such as a
    temperature or a gate), `validation` (scores by name, only after a validation), and `seconds` (of the
    phase so far, including the time before the run was resumed).

    Args:
        directory: Directory of `log.jsonl`. It is None in all processes except the first; then nothing is written.
        trackers: Trackers that also get the values of each line; None for no trackers.
    """

    def __init__(self, directory: Path | None, trackers: Trackers | None = None) -> None:
        self._path = None if directory is None else directory / LOG
        self._sums: dict[str, float] = {}
        self._count = 0
        self.lines: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._trackers = trackers
        self._done = 0  # steps of the earlier phases

    def restart(self, state: Mapping[str, Any] | None = None) -> None:
        """Starts an empty log, or truncates the log to its length at a snapshot.

        Args:
            state: What `state` returned at the snapshot; None for an empty log.

        Raises:
            DataError: The log is damaged.
            OutputError: The log cannot be written.
        """
        self._sums = dict(state["sums"]) if state else {}
        self._count = int(state["count"]) if state else 0
        keep = int(state["lines"]) if state else 0
        if self._path is None:
            return
        fix = f"remove {self._path}"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = read_text(self._path, DataError, fix).splitlines()[:keep] if self._path.exists() else []
            with reading(self._path, "the log of a run", DataError, fix):
                self.lines = [parse_json(line) for line in lines]
            write_file(self._path, "".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise output_error(self._path, error) from error

    def begin(self, done: int, seconds: float = 0.0) -> None:
        """Begins or continues a phase.

        Args:
            done: Steps of the earlier phases.
            seconds: Seconds that the phase has taken already; `seconds` in its lines continues from there.
        """
        self._started = time.monotonic() - seconds
        self._done = done

    def state(self) -> dict[str, Any]:
        """Returns the number of written lines, and the sums of the interval whose line is not yet written."""
        return {"sums": dict(self._sums), "count": self._count, "lines": len(self.lines)}

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the losses and the gradient norm of one step, by name, to the interval."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1

    def write(
        self,
        phase: str,
        step: int,
        rate: float,
        gauges: Mapping[str, float],
        validation: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Writes the line of an interval and starts the next one.

        Args:
            phase: Name of the phase.
            step: Steps done in the phase.
            rate: Learning rate of the last step.
            gauges: Current values of the phase's gauges.
            validation: Scores of a validation after this step.

        Returns:
            The written line.

        Raises:
            OutputError: The log cannot be written.
        """
        means = {key: total / max(1, self._count) for key, total in self._sums.items()}
        self._sums, self._count = {}, 0
        whole = {key: means.pop(key) for key in WHOLE if key in means}
        seconds = round(time.monotonic() - self._started, 2)
        line = {"phase": phase, "step": step, **whole, "losses": means, "rate": rate, "gauges": dict(gauges)}
        if validation:
            line["validation"] = dict(validation)
        line["seconds"] = seconds
        self.lines.append(line)
        if self._path is not None:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise OutputError(
                    output_error(self._path, error).problem,
                    "free some space and run the command again: it resumes from the last snapshot",
                ) from error
        if self._trackers is not None:
            values = {**whole, **means, "rate": rate, **gauges, **(validation or {})}
            self._trackers.log({f"{phase}/{name}": value for name, value in values.items()}, self._done + step)
        return line

    def close(self) -> None:
        """Ends the trackers."""
        if self._trackers is not None:
            self._trackers.close()


def draw_curve(lines: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Plots the losses over the steps, one panel for each phase.

    Args:
        lines: Lines of a log.
        path: The PNG file to write.

    Returns:
        True if the losses were plotted; False if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    phases = list(dict.fromkeys(line["phase"] for line in lines))
    figure = Figure(figsize=(4.0 * max(1, len(phases)), 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    for number, phase in enumerate(phases, 1):
        axes = figure.add_subplot(1, len(phases), number)
        own = [line for line in lines if line["phase"] == phase]
        steps = [line["step"] for line in own]
        axes.plot(steps, [line["loss"] for line in own], label="loss", linewidth=1.4)
        parts = list(own[0]["losses"]) if len(own[0]["losses"]) > 1 else []
        for key in parts:
            axes.plot(steps, [line["losses"][key] for line in own], label=key, linewidth=1.0)
        axes.set_title(phase)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(visible=True, alpha=0.3)
        if parts:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return True
