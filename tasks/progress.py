"""How far a step is, for whoever watches: a terminal, or the logs of a run.

Tasks and flows report here and know nothing of the watcher. The command line puts its own display in place;
under a worker, lines go to the run's log, at most one every ten seconds for a step.
"""

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from prefect.logging import get_run_logger

LOG_SECONDS = 10.0


class Display(Protocol):
    """Something that shows progress."""

    def show(self, step: str, done: int, total: int, note: str) -> None:
        """`done` of `total` units of a step are done; the note is for people."""

    def say(self, line: str) -> None:
        """One line about something that happened."""


class LogDisplay:
    """Progress as lines in the run's log; the first, the last, and one every ten seconds between."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def show(self, step: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done == total or now - self._last.get(step, -LOG_SECONDS) >= LOG_SECONDS:
            self._last[step] = now
            get_run_logger().info("%s: %d of %d%s", step, done, total, f" ({note})" if note else "")

    def say(self, line: str) -> None:
        """Nothing: the line is in the log already."""


_log = LogDisplay()
_displays: list[Display] = []


def watch(display: Display) -> None:
    """Lets `display` show the progress of this process from now on."""
    _displays.append(display)


def show(step: str, done: int, total: int, note: str = "") -> None:
    """Reports progress; to be called within a flow or task run."""
    for display in (_log, *_displays):
        display.show(step, done, total, note)


def say(line: str) -> None:
    """Logs a line to the run, and shows it."""
    get_run_logger().info(line)
    for display in _displays:
        display.say(line)


def training(model: str) -> "TrainingProgress":
    """A progress callback for the training of `model`."""
    return TrainingProgress(model)


class TrainingProgress:
    """What training calls after every step: (done, total, losses)."""

    def __init__(self, model: str, show: Callable[[str, int, int, str], None] = show) -> None:
        self.model = model
        self.show = show

    def __call__(self, done: int, total: int, losses: Mapping[str, float]) -> None:
        self.show(self.model, done, total, "  ".join(f"{name} {value:.3f}" for name, value in losses.items()))
