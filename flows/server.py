"""A real Prefect server as a child of the command line, for those who have none of their own.

Its history lies in `<workspace>/.prefect` and outlives it. Prefect's own embedded server loses most of a run's
history when the process ends; this one is stopped only when the history is stored.
Must be entered before `prefect` is imported: Prefect reads its settings once.
"""

import fcntl
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blip_core.errors import CapfiltError, ConfigError, WorkspaceError
from blip_core.workspace import Workspace

_START_SECONDS = 120
_HISTORY_SECONDS = 60
_STOP_SECONDS = 10
_UNFINISHED = ["PENDING", "RUNNING", "SCHEDULED", "PAUSED", "CANCELLING"]
# Loopback is never reached through a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def local_server(workspace: Workspace, verbose: bool = False) -> Iterator[str]:
    """Yields the address of Prefect's API: the configured one, or that of a server started here.

    Raises ConfigError where the configured server does not answer or the environment cannot run Prefect, and
    WorkspaceError where another process runs flows in this workspace or the server does not start.
    """
    refuse_dataclasses_backport()
    set_environment(verbose)
    configured = configured_api()
    if configured is not None:
        check_answers(configured)
        yield configured
        _send_what_waits()
        return
    home = workspace.prefect_home
    with only_one(workspace), _child_server(home) as api:
        _close_dead_runs(api)
        started = datetime.now(UTC)
        yield api
        _send_what_waits()
        _wait_until_stored(api, started)


def refuse_dataclasses_backport() -> None:
    """Raises ConfigError where img2dataset brought the `dataclasses` backport: Prefect's processes die of it."""
    try:
        version = importlib.metadata.version("dataclasses")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ConfigError(
        f"the package dataclasses {version} (a backport for Python 3.6 that img2dataset asks for) hides Python's own "
        "module from Prefect; remove it with: pip uninstall dataclasses"
    )


def configured_api() -> str | None:
    """Prefect's PREFECT_API_URL from the environment, a profile or a settings file; None where there is none."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    # In a process of its own, because Prefect's settings are fixed by their first import.
    code = "from prefect.settings import Settings; print(Settings().api.url or '')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise ConfigError(f"Prefect's settings cannot be read: {_last_line(answer.stderr)}")
    return answer.stdout.strip() or None


def set_environment(verbose: bool) -> None:
    """No telemetry, no proxy on loopback; run logs go to the server, and to the terminal only if `verbose`."""
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))


def check_answers(api: str) -> None:
    """Raises ConfigError where no Prefect server answers at this address."""
    try:
        urllib.request.urlopen(f"{api}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return  # It answers; whether we may come in, Prefect will say.
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"PREFECT_API_URL is {api}, and no Prefect server answers there ({reason}); start it, or unset it"
        ) from error


@contextmanager
def only_one(workspace: Workspace) -> Iterator[None]:
    """Holds the workspace's lock of this machine, which the kernel frees when this process ends, however it ends."""
    workspace.prefect_home.mkdir(parents=True, exist_ok=True)
    with (workspace.prefect_home / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkspaceError(
                f"workspace {workspace.root}: another capfilt run is at work here; wait until it ends, "
                "or let both use one Prefect server (PREFECT_API_URL)"
            ) from error
        yield


@contextmanager
def _child_server(home: Path) -> Iterator[str]:
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    os.environ["PREFECT_HOME"] = str(home)
    os.environ["PREFECT_API_URL"] = api
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = home / "server.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "flows.child", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(child, api, log)
        yield api
    finally:
        stop(child)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(child: subprocess.Popen[bytes], api: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            break
        try:
            _DIRECT.open(f"{api}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise WorkspaceError(f"the local Prefect server did not start: {_last_line(log.read_text())} (all of it: {log})")


def stop(child: subprocess.Popen[bytes]) -> None:
    """Ends a process group: politely, and after a while by force."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        os.killpg(child.pid, signum)
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _post(api: str, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{api}/{path}", data=data, headers={"Content-Type": "application/json"})
    try:
        with _DIRECT.open(request, timeout=30) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise CapfiltError(f"the local Prefect server at {api} does not answer {path} ({error})") from error


def _close_dead_runs(api: str) -> None:
    """Runs that a killed process left running or paused are marked as crashed; the lock says that none is alive."""
    left = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PAUSED"]}}}, "limit": 200}
    dead = _post(api, "flow_runs/filter", left)
    state = {"type": "CRASHED", "message": "The process was killed; a later run of the same configuration goes on."}
    for run in dead:
        _post(api, f"flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _send_what_waits() -> None:
    """Sends the events and logs that Prefect's clients still hold."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=_STOP_SECONDS)
    APILogWorker.drain_all(timeout=_STOP_SECONDS)


def _wait_until_stored(api: str, started: datetime) -> None:
    """Waits until the server has stored all task runs since `started` (60 s at most)."""
    ours = {"flow_runs": {"start_time": {"after_": started.isoformat()}}}
    unfinished = {**ours, "task_runs": {"state": {"type": {"any_": _UNFINISHED}}}}
    deadline = time.monotonic() + _HISTORY_SECONDS
    stored = -1
    while time.monotonic() < deadline:
        before, stored = stored, _post(api, "task_runs/count", ours)
        # The server stores dozens of task runs a second: a count that rests has come to its end.
        if stored == before and _post(api, "task_runs/count", unfinished) == 0:
            return
        time.sleep(1)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
