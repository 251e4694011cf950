"""The platform as supervised processes: PostgreSQL, Redis, Prefect's server, a worker of each pool, and deployments."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterExpectedStartTime
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelling

from services.postgres import Postgres, postgres
from services.prefect import Server, Worker, redis_messaging
from services.redis import redis
from services.supervised import Supervised

Answer = TypeVar("Answer")

ROOT = Path(__file__).parents[2]
POOLS = ("cpu", "gpu")
# As deployments/ set it for workers and runs: asked again for a minute while a database starts again.
PATIENT = {"PREFECT_CLIENT_RETRY_EXTRA_CODES": "500"}
_LIMITS = {"cpu": None, "gpu": 1}  # as the units in deployments/systemd have it
_API_SECONDS = 240.0


class Platform:
    """The running parts, and what a person does at the server."""

    def __init__(self, database: Postgres, server: Supervised, workers: dict[str, Supervised]) -> None:
        self.database = database
        self.server = server
        self.workers = workers
        assert isinstance(server.program, Server)
        self.api = server.program.api
        self.environment = server.program.client

    def start(self, name: str, parameters: dict[str, object]) -> UUID:
        """Schedules a run of `<name>/capfilt`, as the UI's form does."""
        deployment = self.ask(lambda client: client.read_deployment_by_name(f"{name}/capfilt"))
        return self.ask(lambda client: client.create_flow_run_from_deployment(deployment.id, parameters=parameters)).id

    def retry(self, run: UUID) -> None:
        """Puts a run that has ended back, as the UI's Retry does."""
        self.ask(lambda client: client.set_flow_run_state(run, AwaitingRetry()))

    def cancel(self, run: UUID) -> None:
        """Cancels a run, as the UI does."""
        self.ask(lambda client: client.set_flow_run_state(run, Cancelling()))

    def run(self, run: UUID) -> FlowRun:
        return self.ask(lambda client: client.read_flow_run(run))

    def state(self, run: UUID) -> State:
        state = self.run(run).state
        assert state is not None
        return state

    def history(self, run: UUID) -> list[str]:
        """The names of the states that a run went through."""
        states = self.ask(lambda client: client.read_flow_run_states(run))
        return [state.name or "" for state in sorted(states, key=lambda state: state.timestamp)]

    def runs_since(self, moment: object) -> list[FlowRun]:
        """All runs that were expected to start after a moment, those within other runs included."""
        wanted = FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime(after_=moment))
        return self.ask(lambda client: client.read_flow_runs(flow_run_filter=wanted, limit=200))

    def ask(self, question: Callable[[SyncPrefectClient], Answer]) -> Answer:
        """What the server answers, when it answers."""
        deadline = time.monotonic() + _API_SECONDS
        while True:
            try:
                with temporary_settings({PREFECT_API_URL: self.api}), get_client(sync_client=True) as client:
                    return question(client)
            except httpx.HTTPError:
                assert time.monotonic() < deadline, self.logs()
                time.sleep(1)

    def capfilt(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Runs the command line with this server."""
        return subprocess.run(
            [sys.executable, "-m", "flows", *map(str, words)],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def logs(self) -> str:
        """The last of what every part said."""
        parts = [self.server, *self.workers.values()]
        return "\n".join(part.program.log.read_text(errors="replace")[-3000:] for part in parts)


@contextmanager
def platform(folder: Path, config: Path, settings: dict[str, str]) -> Iterator[Platform]:
    """A platform whose deployments have this configuration.

    Args:
        folder: for its files and logs.
        config: the YAML file that `capfilt setup-prefect` is given.
        settings: more environment variables of the workers and their runs.
    """
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        messages = stack.enter_context(redis(folder))
        server = Server(folder / "server", database.url, redis_messaging(messages.port))
        supervised = stack.enter_context(Supervised(server).start())
        workers = {
            pool: Supervised(Worker(server, pool, folder / pool, _LIMITS[pool], settings | PATIENT | _mark()))
            for pool in POOLS
        }
        made = Platform(database, supervised, workers)
        done = made.capfilt("setup-prefect", config, "--gpus", 1)
        assert done.returncode == 0, done.stderr
        for worker in workers.values():
            stack.enter_context(worker.start())
        stack.callback(_end_runs)
        yield made


def processes_of(run: UUID) -> list[int]:
    """The living processes of a flow run: its own first, and then those that it started."""
    return _processes_with(f"PREFECT__FLOW_RUN_ID={run}")


def _start_time(process: int) -> int:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    return 0


def _end_runs() -> None:
    """Kills the runs of these workers that outlived them."""
    for name, value in _mark().items():
        for process in _processes_with(f"{name}={value}"):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _mark() -> dict[str, str]:
    return {"CAPFILT_TEST_PROCESS": str(os.getpid())}


def _processes_with(variable: str) -> list[int]:
    """Those that have it in their environment, the first first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return sorted(found, key=_start_time)
