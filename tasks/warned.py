"""Warnings counted, not repeated: each kind once in the run's log when it first comes, and at the end how often.

Takes Python's warnings and what libraries log as warnings, from every thread of the process, while a step works.
Texts that differ in numbers alone are one kind.
"""

import logging
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from prefect.logging import get_run_logger

from tasks import progress

KINDS = 20  # that are shown; further ones are only counted
LINE = 300  # characters
COUNTED = "capfilt_counted"
# Their records stop at their own handlers and never come to the root's, as a rule.
APART = ("transformers", "huggingface_hub", "ray")
OWN = "prefect"  # the run's log itself


@contextmanager
def counted_warnings(step: str) -> Iterator[None]:
    """Counts the warnings of a step; to be used within its flow's run.

    Warnings that a filter ignores stay ignored; the others are counted every time, where Python would show them once.
    """
    tally = Tally(step, get_run_logger())
    loggers = [logging.getLogger(), *map(logging.getLogger, APART)]
    shown = warnings.showwarning
    warnings.simplefilter("always", append=True)
    warnings.showwarning = tally.warned
    for logger in loggers:
        logger.addHandler(tally)
    try:
        yield
    finally:
        warnings.showwarning = shown
        for logger in loggers:
            logger.removeHandler(tally)
        tally.sum_up()


class Tally(logging.Handler):
    """The kinds of warnings of a step, and how often each came."""

    def __init__(self, step: str, log: "logging.Logger | logging.LoggerAdapter[logging.Logger]") -> None:
        super().__init__(logging.WARNING)
        self.step = step
        self.log = log
        self._first: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._counting = threading.RLock()

    def warned(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """In the place of `warnings.showwarning`."""
        self._count(f"{category.__name__}: {message}")

    def emit(self, record: logging.LogRecord) -> None:
        """A record of a library's logger."""
        if record.name.partition(".")[0] != OWN and not hasattr(record, COUNTED):
            setattr(record, COUNTED, True)  # it may come to the root's handlers after all
            self._count(f"{record.name}: {record.getMessage()}")

    def _count(self, text: str) -> None:
        line = " ".join(text.split())
        line = line if len(line) <= LINE else f"{line[:LINE]}..."
        kind = re.sub(r"\d+", "0", line)
        with self._counting:
            self._counts[kind] += 1
            if kind not in self._first and len(self._first) < KINDS:
                self._first[kind] = line
                self._say(line)

    def sum_up(self) -> None:
        """Says how often each kind came that came more than once, and what was not shown at all."""
        for kind, line in self._first.items():
            if self._counts[kind] > 1:
                self._say(f"{self._counts[kind]:,} times in all: {line}")
        hidden = [kind for kind in self._counts if kind not in self._first]
        if hidden:
            times = sum(self._counts[kind] for kind in hidden)
            self._say(f"{times:,} more warnings of {len(hidden):,} other kinds")

    def _say(self, line: str) -> None:
        progress.warn(f"{self.step}: {line}", self.log)
