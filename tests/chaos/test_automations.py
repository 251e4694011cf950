"""Dead runs on a real server with real workers: they are noticed, put back, run again, and not without end."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending
from services.postgres import postgres
from services.prefect import Server, Worker, redis_messaging
from services.redis import redis

from flows.automations import HEARTBEAT_SECONDS, ensure_automations

SILENCE_SECONDS, START_SECONDS, REST_SECONDS, RERUNS = 1.5 * HEARTBEAT_SECONDS, 30.0, 15.0, 2
SECONDS = 300  # within which a dead run is noticed and runs again
pytestmark = pytest.mark.timeout(2 * SECONDS)
HEARTBEATS = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}

# The first try waits to be killed, the second one ends; with `crash` no try lives.
PROBE = """
import os, signal, time
from pathlib import Path
from prefect import flow

@flow(name="probe")
def probe(log: str, crash: bool = False) -> None:
    with Path(log).open("a") as file:
        print(os.getpid(), file=file)
    if crash:
        os.kill(os.getpid(), signal.SIGKILL)
    while len(Path(log).read_text().split()) < 2:
        time.sleep(0.1)
"""


class Run(NamedTuple):
    """A flow run of the probe, and the file to which every try adds its process."""

    id: UUID
    log: Path

    def tries(self) -> list[int]:
        return [int(pid) for pid in self.log.read_text().split()] if self.log.exists() else []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # With SQLite a busy server loses some of the events that automations wait for.
    folder = tmp_path_factory.mktemp("server")
    with (
        postgres() as database,
        redis(folder) as messages,
        Server(folder, database.url, redis_messaging(messages.port)) as running,
    ):
        running.start()
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as made:
        ensure_automations(made, SILENCE_SECONDS, START_SECONDS, REST_SECONDS, RERUNS)
        yield made


@pytest.fixture(scope="module")
def runs(
    server: Server, client: SyncPrefectClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Run]]:
    """Runs that die in different ways, all at the same time; a new worker stands in every pool."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.py").write_text(PROBE)

    def worker(pool: str) -> Worker:
        started = Worker(server, pool, folder, limit=5, settings=HEARTBEATS)
        started.start()
        return started

    def run(name: str, pool: str, tags: Sequence[str] = ("capfilt", "rerun"), **changes: Any) -> Run:
        return schedule(client, folder, name, pool, tags, **changes)

    for pool in ("killed", "stopped", "living", "unmanned"):
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    workers = [worker(pool) for pool in ("killed", "stopped", "living")]
    try:
        made = {
            "killed": run("killed", "killed"),
            "not to run again": run("not-to-run-again", "killed", ["capfilt"]),
            "of others": run("of-others", "killed", []),
            "stopped": run("stopped", "stopped"),
            "crashing": run("crashing", "living", crash=True),
            "broken": run("broken", "living", entrypoint="probe.py:missing"),
            "taken": run("taken", "unmanned"),
        }
        client.set_flow_run_state(made["taken"].id, Pending())  # as a worker does that then dies
        die_with_runs(workers[0], [made[name] for name in ("killed", "not to run again", "of others")])
        wait_for(lambda: made["stopped"].tries())
        workers[1].kill(signal.SIGTERM)
        workers += [worker("killed"), worker("stopped")]
        yield made
    finally:
        for each in workers:
            each.stop()


def schedule(
    client: SyncPrefectClient,
    folder: Path,
    name: str,
    pool: str,
    tags: Sequence[str],
    entrypoint: str = "probe.py:probe",
    crash: bool = False,
) -> Run:
    """Deploys the probe under this name, and schedules one run of it."""
    deployment = client.create_deployment(
        flow_id=client.create_flow_from_name("probe"),
        name=name,
        work_pool_name=pool,
        entrypoint=entrypoint,
        tags=list(tags),
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}],
    )
    log = folder / f"{name}.log"
    return Run(client.create_flow_run_from_deployment(deployment, parameters=_parameters(log, crash)).id, log)


def _parameters(log: Path, crash: bool) -> dict[str, str | bool]:
    return {"log": str(log), "crash": crash}


def die_with_runs(worker: Worker, runs: Sequence[Run]) -> None:
    """SIGKILLs a worker and then its runs, so that nobody is left to tell the server."""
    wait_for(lambda: all(run.tries() for run in runs))
    time.sleep(2)  # the heartbeats of a run that has just started are on their way
    worker.kill()
    for run in runs:
        os.kill(run.tries()[0], signal.SIGKILL)


def wait_for(reached: Callable[[], object], found: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline, f"waited for {SECONDS} s: {found()}"
        time.sleep(0.5)


def history(client: SyncPrefectClient, run: Run) -> list[str]:
    """The names of the states that a run went through."""
    states = sorted(client.read_flow_run_states(run.id), key=lambda state: state.timestamp)
    return [state.name or "" for state in states]


def rest(client: SyncPrefectClient, run: Run) -> None:
    """Waits until the run's last state is older than those were after which it was put back."""
    last = max(state.timestamp for state in client.read_flow_run_states(run.id))
    wait_for(lambda: (datetime.now(UTC) - last).total_seconds() > 2 * REST_SECONDS)


def completed(client: SyncPrefectClient, run: Run) -> FlowRun:
    """The run, when it has ended well."""
    wait_for(lambda: history(client, run)[-1] == "Completed", lambda: history(client, run))
    return client.read_flow_run(run.id)


def test_a_run_that_was_killed_with_its_worker_runs_again(client: SyncPrefectClient, runs: dict[str, Run]) -> None:
    found = completed(client, runs["killed"])
    assert found.run_count == len(runs["killed"].tries()) == 2
    assert found.parameters == _parameters(runs["killed"].log, crash=False)
    names = history(client, runs["killed"])
    assert [name for name in names if name in ("Crashed", "AwaitingRetry", "Completed")] == [
        "Crashed",
        "AwaitingRetry",
        "Completed",
    ]


def test_a_run_of_a_worker_that_was_asked_to_stop_runs_again(client: SyncPrefectClient, runs: dict[str, Run]) -> None:
    assert completed(client, runs["stopped"]).run_count == len(runs["stopped"].tries()) == 2


def test_a_run_whose_worker_died_before_it_ran_is_put_back(client: SyncPrefectClient, runs: dict[str, Run]) -> None:
    wait_for(lambda: "AwaitingRetry" in history(client, runs["taken"]), lambda: history(client, runs["taken"]))
    found = [name for name in history(client, runs["taken"]) if name != "Late"]
    assert found == ["Scheduled", "Pending", "Crashed", "NeverStarted", "AwaitingRetry"]


def test_a_run_that_crashes_every_time_is_left_crashed_in_the_end(
    client: SyncPrefectClient, runs: dict[str, Run]
) -> None:
    wait_for(
        lambda: history(client, runs["crashing"]).count("Crashed") == 1 + RERUNS,
        lambda: history(client, runs["crashing"]),
    )
    rest(client, runs["crashing"])
    assert history(client, runs["crashing"])[-1] == "Crashed"
    assert len(runs["crashing"].tries()) == 1 + RERUNS


def test_a_run_that_cannot_start_is_put_back_once(client: SyncPrefectClient, runs: dict[str, Run]) -> None:
    wait_for(
        lambda: history(client, runs["broken"]).count("NeverStarted") == 2, lambda: history(client, runs["broken"])
    )
    rest(client, runs["broken"])
    assert history(client, runs["broken"])[-1] == "NeverStarted"
    assert client.read_flow_run(runs["broken"].id).run_count == 0


def test_only_runs_with_the_tag_rerun_are_put_back_and_those_of_others_left_alone(
    client: SyncPrefectClient, runs: dict[str, Run]
) -> None:
    wait_for(lambda: "Crashed" in history(client, runs["not to run again"]))
    completed(client, runs["killed"])
    assert history(client, runs["not to run again"])[-1] == "Crashed"
    assert history(client, runs["of others"])[-1] == "Running"


def test_automations_are_made_once_updated_where_they_differ_and_stay_off_where_they_were_turned_off(
    client: SyncPrefectClient, runs: dict[str, Run]
) -> None:
    completed(client, runs["killed"])
    before = {automation.id: automation for automation in client.read_automations()}
    names = ensure_automations(client, SILENCE_SECONDS, START_SECONDS, REST_SECONDS, RERUNS)
    assert {automation.id: automation for automation in client.read_automations()} == before
    assert sorted(automation.name for automation in before.values()) == sorted(names)
    silent = client.read_automations_by_name(names[0])[0]
    client.pause_automation(silent.id)
    ensure_automations(client, SILENCE_SECONDS + 60, START_SECONDS, REST_SECONDS, RERUNS)
    after = client.read_automations_by_name(names[0])[0]
    assert (after.id, after.enabled) == (silent.id, False)
    assert after.trigger != silent.trigger
    assert len(client.read_automations()) == len(before)
