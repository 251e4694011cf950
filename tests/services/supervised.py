"""A program that is started again when it ends, as systemd starts the units in deployments/systemd again."""

import os
import signal
import threading
from contextlib import suppress

from services.program import READY_SECONDS, Program

RESTART_SECONDS = 5.0  # RestartSec of the units
_LOOK_SECONDS = 0.2


class Supervised:
    """Keeps a program running from `start` to `stop`, whatever ends it in between."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> "Supervised":
        """Starts the program and waits until it is ready."""
        self.program.start()
        self._watcher.start()
        return self

    def strike(self, signum: int = signal.SIGKILL) -> None:
        """Signals the program alone and waits for its end; the next one is started a while later."""
        process = self.program.process
        assert process is not None, f"{self.program.command[0]} was not started"
        with suppress(ProcessLookupError):
            os.kill(process.pid, signum)
        process.wait(READY_SECONDS)

    def stop(self) -> None:
        """Ends the program for good."""
        self._left.set()
        self._watcher.join()
        self.program.stop()

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._left.wait(_LOOK_SECONDS):
            if not self.program.alive and not self._left.wait(RESTART_SECONDS):
                self.program.launch()
