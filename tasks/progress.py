"""How far a step is, for whoever watches: a terminal, the log of a run, or its page in Prefect's UI.

Tasks and flows report here and know nothing of the watcher. The command line puts its own display in place;
under a worker, lines go to the run's log and to an artifact, at most one every ten seconds for a step.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from prefect.logging import get_run_logger

from tasks.artifacts import ArtifactDisplay

LOG_SECONDS = 10.0
RATE_SECONDS = 60.0


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


class Meter:
    """What is done of a step by all of its tasks in this process, how fast, and how long the rest takes.

    Args:
        standing: units that were done before, which say nothing of the speed.
        unit: of what is counted; images and steps have a speed and a time that is left.
        clock: seconds.
    """

    def __init__(
        self, total: int, standing: int = 0, unit: str = "images", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.standing = standing
        self.unit = unit
        self._clock = clock
        self._parts: dict[str, int] = {}
        self._failed: set[str] = set()
        self._recent = deque([(clock(), standing)])
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        return self.standing + sum(self._parts.values())

    def at(self, part: str, done: int) -> None:
        """So many units of a part, a shard, are done so far."""
        with self._lock:
            self._parts[part] = done
            self._failed.discard(part)
            now = self._clock()
            self._recent.append((now, self.done))
            while len(self._recent) > 2 and now - self._recent[1][0] >= RATE_SECONDS:
                self._recent.popleft()

    def fail(self, part: str) -> None:
        """A part has failed: what was done of it is lost."""
        with self._lock:
            self._parts.pop(part, None)
            self._failed.add(part)

    def note(self) -> str:
        """The speed over the last minute, the time that the rest takes at it, and how many parts failed."""
        speed = self.speed()
        with self._lock:
            done = self._recent[-1][1]
            failed = f"{len(self._failed)} failed" if self._failed else ""
        rate = left = ""
        if self.unit in ("images", "steps") and speed > 0:
            rate = f"{speed:.3g} {self.unit}/s"
            left = f"{_duration((self.total - done) / speed)} left" if done < self.total else ""
        return ", ".join(filter(None, [rate, left, failed]))

    def speed(self) -> float:
        """Units a second over the last minute; 0 where it is not known yet."""
        with self._lock:
            (began, before), (now, done) = self._recent[0], self._recent[-1]
        return (done - before) / (now - began) if now > began else 0.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


_displays: list[Display] = [LogDisplay(), ArtifactDisplay()]
_meters: dict[str, Meter] = {}


def watch(display: Display) -> None:
    """Lets `display` show the progress of this process from now on."""
    _displays.append(display)


def show(step: str, done: int, total: int, note: str = "") -> None:
    """Reports progress; to be called within a flow or task run."""
    for display in _displays:
        display.show(step, done, total, note)


def say(line: str) -> None:
    """Logs a line to the run, and shows it."""
    get_run_logger().info(line)
    for display in _displays:
        display.say(line)


def warn(line: str, log: "logging.Logger | logging.LoggerAdapter[logging.Logger]") -> None:
    """Logs a warning to the run whose logger this is, from whatever thread, and shows it."""
    log.warning("%s", line)
    for display in _displays:
        display.say(line)


def begin(step: str, total: int, standing: int = 0, unit: str = "images") -> None:
    """Starts a step's meter; its tasks then say where they are by `at`."""
    _meters[step] = Meter(total, standing, unit)
    _show_meter(step)


def at(step: str, part: str, done: int) -> None:
    """So many units of a part of a step are done so far; nothing where the step was begun in another process."""
    if step in _meters:
        _meters[step].at(part, done)
        _show_meter(step)


def fail(step: str, part: str, failure: Exception) -> None:
    """A part of a step has failed for good."""
    say(f"{step}: shard {part} failed: {failure}")
    if step in _meters:
        _meters[step].fail(part)
        _show_meter(step)


def _show_meter(step: str) -> None:
    meter = _meters[step]
    show(step, meter.done, meter.total, meter.note())


class TrainingProgress:
    """Steps done, with steps and images a second, the time that is left, and the last losses.

    Args:
        batch_size: images of a step.
        show: where it is shown, as `show` of this module.
    """

    def __init__(self, model: str, batch_size: int, show: Callable[[str, int, int, str], None] = show) -> None:
        self.model = model
        self.batch_size = batch_size
        self.show = show
        self._meter: Meter | None = None

    def __call__(self, done: int, total: int, losses: Mapping[str, float]) -> None:
        if self._meter is None:  # what an earlier process did says nothing of the speed of this one
            self._meter = Meter(total, done, unit="steps")
        self._meter.at(self.model, done - self._meter.standing)
        speed = self._meter.speed()
        rate = f"{speed * self.batch_size:.3g} images/s" if speed else ""
        values = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.show(self.model, done, total, ", ".join(filter(None, [self._meter.note(), rate, values])))
