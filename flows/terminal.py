"""Progress for people: bars where stderr is a terminal, a line now and then where it is not."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 15.0


class TerminalDisplay:
    """Shows the progress of steps on stderr; a `tasks.progress.Display`, and a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> "TerminalDisplay":
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._bars.stop()

    def show(self, step: str, done: int, total: int, note: str) -> None:
        """Moves the step's bar, or writes its line if the last one is long ago."""
        if self.console.is_terminal:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step, total=total, note=note)
            self._bars.update(self._tasks[step], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if done == total or now - self._last.setdefault(step, now) >= _LINE_SECONDS:
            self._last[step] = now
            self.say(f"{step}: {done} of {total}{f'  {note}' if note else ''}")

    def say(self, line: str) -> None:
        """Writes one line above the bars."""
        self.console.print(line, markup=False)
