"""The local Prefect server: it is found or started, keeps the history, and ends with the run, however that ends."""

import importlib.metadata
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blip_core.errors import ConfigError, WorkspaceError
from blip_core.workspace import Workspace
from flows.server import free_port, local_server, refuse_dataclasses_backport

Configure = Callable[..., Path]


@contextmanager
def started(config: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`capfilt bootstrap` with a local server; yields the process when the server is up, and its port."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"HOME": str(config.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows", "bootstrap", str(config), "--set", "pretrain.steps=100000"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.fullmatch(r"Prefect: http://127\.0\.0\.1:(\d+)\n", line)
        assert address, line
        yield process, int(address[1])
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_sigterm_ends_the_run_with_a_line_and_stops_the_server(configure: Configure) -> None:
    with started(configure()) as (process, port):
        assert answers(port)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert err.splitlines()[-1].startswith("SIGTERM: stopped")
        assert "Traceback" not in err
        assert not answers(port)


def test_a_killed_run_takes_its_server_along_and_the_next_one_starts(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    with started(config) as (process, port):
        with pytest.raises(WorkspaceError, match="another capfilt run"), _no_prefect_configured():
            enter(Workspace(tmp_path / "workspace"))
        process.kill()
        process.wait()
        # The kernel kills the child when it has taken note of the parent's end.
        for _ in range(1000):
            if not answers(port):
                break
        assert not answers(port)
    answer = subprocess.run(
        [sys.executable, "-m", "flows", "download", str(config)],
        env={**os.environ, "HOME": str(tmp_path), "PREFECT_API_URL": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    states = states_of(tmp_path / "workspace")
    assert set(states["flow_run"]) <= {"COMPLETED", "CRASHED"}
    assert set(states["task_run"]) == {"COMPLETED"}
    assert len(states["task_run"]) >= 1


def states_of(workspace: Path) -> dict[str, list[str]]:
    """The stored states of the flow and task runs of the last command."""
    with sqlite3.connect(workspace / ".prefect" / "prefect.db") as history:
        last = "(SELECT id FROM flow_run ORDER BY start_time DESC LIMIT 1)"
        return {
            "flow_run": [state for (state,) in history.execute("SELECT state_type FROM flow_run")],
            "task_run": [
                state for (state,) in history.execute(f"SELECT state_type FROM task_run WHERE flow_run_id = {last}")
            ],
        }


def enter(workspace: Workspace) -> None:
    with local_server(workspace):
        pytest.fail("a second server was started")


@contextmanager
def _no_prefect_configured() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.server.configured_api", lambda: None)
        for name in ("DO_NOT_TRACK", "NO_PROXY", "no_proxy", "PREFECT_LOGGING_LEVEL"):
            patch.setenv(name, os.environ.get(name, ""))
        patch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        yield


def test_a_configured_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}/api"
    with _no_prefect_configured():
        monkeypatch.setattr("flows.server.configured_api", lambda: address)
        with pytest.raises(ConfigError, match=re.escape(address)):
            enter(Workspace(tmp_path))


def test_the_dataclasses_backport_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"dataclasses": "0.8"}[name])
    with pytest.raises(ConfigError, match="pip uninstall dataclasses"):
        refuse_dataclasses_backport()
