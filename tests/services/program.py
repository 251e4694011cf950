"""A program of a test's own: started in a process group, with a log, known to be ready, killed or stopped at will."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

READY_SECONDS = 120.0
STOP_SECONDS = 15.0


class Program:
    """One program that can be started again after it was killed.

    Args:
        command: its words.
        log: the file that its output is appended to.
        ready: whether it answers; asked until it does. None: it is ready at once.
        environment: all of its environment; None: this process's.
        user: whom it runs as, where this process is root.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        ready: Callable[[], bool] | None = None,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        self.ready = ready
        self.environment = dict(environment if environment is not None else os.environ)
        self.user = user
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.command[0]} was not started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> "Program":
        """Starts it and waits until it is ready; a program that ends before fails the test with its log."""
        self.launch()
        self.wait_ready()
        return self

    def launch(self) -> None:
        """Starts it and waits for nothing."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                user=self.user,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Waits until the program answers."""
        deadline = time.monotonic() + READY_SECONDS
        while self.ready is not None and not self.ready():
            if not self.alive or time.monotonic() > deadline:
                state = "is not ready" if self.alive else "ended"
                raise AssertionError(
                    f"{' '.join(self.command)} {state}:\n{self.log.read_text(errors='replace')[-4000:]}"
                )
            time.sleep(0.1)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Signals the program alone, not its children, and waits for its end."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signum)
            self.process.wait(READY_SECONDS)

    def stop(self) -> None:
        """Ends the program and all of its process group, politely and then by force."""
        if self.process is None:
            return
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.process = None

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def find_program(*names: str) -> str:
    """The path of the first of these programs that is installed; skips the test where none is."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{names[0]} is not installed")


def accepts(port: int) -> bool:
    """Whether a program takes connections on this port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
