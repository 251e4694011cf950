"""Runs one flow from the command line: its server, its progress on the terminal, and its end by a signal.

The flow runs in a thread of its own, so that this thread can answer SIGINT and SIGTERM at once, whatever a step
is at. Parts on disk have their final names only when they are whole: ending a process anywhere loses no more
than the part at hand.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from blip_core.workspace import Workspace
from flows.server import local_server
from flows.terminal import TerminalDisplay

if TYPE_CHECKING:
    from blip_core.config import BootstrapConfig


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run_flow(name: str, config: "BootstrapConfig", verbose: bool, **parameters: object) -> None:
    """Runs the flow `flows.<name>.<name>` to its end. Raises what it raises, and Interrupted.

    Args:
        config: its configuration; the workspace is opened first.
        verbose: whether Prefect's log is shown as well.
        parameters: further parameters of the flow.
    """
    workspace = Workspace.open(config.workspace)
    executor = ThreadPoolExecutor(1)
    with _interruptible(), TerminalDisplay() as display, local_server(workspace, verbose) as api:
        display.say(f"Prefect: {api.removesuffix('/api')}")
        failure = executor.submit(_call, name, display, config=config, **parameters).exception()
    if failure is not None:
        raise failure


def _call(name: str, display: TerminalDisplay, **parameters: object) -> None:
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from tasks import progress

    progress.watch(display)
    flow: Callable[..., None] = getattr(importlib.import_module(f"flows.{name}"), name)
    # Heartbeats tell a server that a run is dead; here the server ends with the run. Each costs a flow a second.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        flow(**parameters)


@contextmanager
def _interruptible() -> Iterator[None]:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def leave(status: int | str | None) -> NoReturn:
    """Ends the process without waiting for threads of a flow, and without the teardown of the libraries in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
