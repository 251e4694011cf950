"""The shell of `capfilt query`: one statement after the other, on a terminal or from a pipe.

A statement ends with a semicolon at the end of a line. On a terminal, one that fails is told and the next one asked
for; from a pipe it ends the shell, as it ends `capfilt query SQL`.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pyarrow as pa

from blip_core.corpus.query import run_query
from blip_core.errors import QueryError
from blip_core.workspace import Workspace

_FIRST, _NEXT = "capfilt> ", "    ...> "
_LEAVE = ("exit", "quit", ".exit", ".quit")


def run_shell(workspace: Workspace, show: Callable[[pa.Table], None], filter: str | None = None) -> None:
    """Answers statements of stdin until it ends or says `exit`. Raises QueryError where stdin is no terminal.

    `filter` is as run_query takes it.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            importlib.import_module("readline")  # lets input() edit lines and remember them
        sys.stderr.write("One SELECT over the workspace's views, ended by a semicolon; SHOW TABLES; exit\n")
    for statement in _statements(interactive):
        try:
            show(run_query(workspace, statement, filter))
        except QueryError as error:
            if not interactive:
                raise
            sys.stderr.write(f"error: {error}\n")


def _statements(interactive: bool) -> Iterator[str]:
    """The statements of stdin; the last one of a pipe needs no semicolon."""
    lines: list[str] = []
    while (line := _line((_NEXT if lines else _FIRST) if interactive else "", lines)) is not None:
        if not lines and line.strip().lower().rstrip(";") in _LEAVE:
            return
        if line.strip() or lines:
            lines.append(line)
        if line.rstrip().endswith(";"):
            yield "\n".join(lines)
            lines.clear()
    if "".join(lines).strip():
        yield "\n".join(lines)


def _line(prompt: str, lines: list[str]) -> str | None:
    """The next line, None at the end; Ctrl-C gives up what was begun."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            lines.clear()
