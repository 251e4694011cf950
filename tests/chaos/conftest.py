"""What the killed runs have in common: a Prefect server that no kill reaches, and waiting for a moment."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from flows.server import free_port, stop

SECONDS = 120


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the runs: one Prefect server for all of them, which no kill reaches."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    variables = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until(lambda: _healthy(variables["PREFECT_API_URL"]), server)
        yield variables
    finally:
        stop(server)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., bool]:
    """A function of a condition and a process: whether the condition came true before the process ended."""
    return _wait_until


@pytest.fixture
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Starts `capfilt` with these words, in a process group of its own."""

    def started(*words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows", *map(str, words)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return started


@pytest.fixture
def ends_well() -> Callable[[subprocess.Popen[str]], None]:
    """Waits for the end of a run, which must be a success."""

    def ended(process: subprocess.Popen[str]) -> None:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output

    return ended


def _healthy(api: str) -> bool:
    try:
        with closing(urllib.request.urlopen(f"{api}/health", timeout=5)):
            return True
    except OSError:
        return False


def _wait_until(reached: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> bool:
    """Whether the moment came before the process ended."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if reached():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError(f"waited for {SECONDS} s")
