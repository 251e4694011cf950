"""Rounds that a person approves: with a real server and worker, answered as Prefect's UI answers."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pyarrow.parquet as pq
import pytest
import yaml
from services.prefect import Server, Worker

from blip_core.corpus.rounds import promoted_round, round_states
from blip_core.files import read_json
from blip_core.workspace import Workspace

pytestmark = pytest.mark.timeout(900)  # a round takes some seconds, or minutes on a busy machine

ROOT = Path(__file__).parents[2]
SECONDS = 240.0
BUSY = 503  # of a server whose SQLite is locked


def wait(look: Callable[[], Any], wanted: Callable[[Any], bool], log: Callable[[], str] = str) -> Any:
    """Looks until it sees what is wanted, and returns that."""
    deadline = time.monotonic() + SECONDS
    while not wanted(found := look()):
        assert time.monotonic() < deadline, f"{found}\n{log()}"
        time.sleep(0.5)
    return found


class Platform(NamedTuple):
    """A server, a worker of its pool `cpu`, and the deployment of `re-bootstrap`."""

    server: Server
    worker: Worker

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self.wait(lambda: self.request(path, body), lambda answer: answer.status_code != BUSY)
        assert answer.is_success, answer.text
        return answer.json()

    def request(self, path: str, body: dict[str, Any] | None) -> httpx.Response:
        method = "GET" if body is None else "POST"
        return httpx.request(method, f"{self.server.api}/{path}", json=body, timeout=60, trust_env=False)

    def start(self, config: dict[str, Any]) -> str:
        deployment = self.ask("deployments/name/re-bootstrap/capfilt")["id"]
        body = {"parameters": {"config": config}, "state": {"type": "SCHEDULED"}}
        return self.ask(f"deployments/{deployment}/create_flow_run", body)["id"]

    def wait_for(self, run: str, state: str) -> Any:
        """Waits until the run is in a state of that type, and returns it."""
        return self.wait(lambda: self.ask(f"flow_runs/{run}"), lambda found: found["state"]["type"] == state)

    def wait_suspended(self, run: str) -> Any:
        """Waits until the run is suspended and its process has ended, and returns it."""
        found = self.wait_for(run, "PAUSED")
        self.wait(lambda: processes_of(run), lambda found: not found)
        return found

    def wait(self, look: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
        return wait(look, wanted, lambda: self.worker.log.read_text(errors="replace")[-6000:])

    def form(self, run: str) -> tuple[dict[str, Any], str]:
        """The schema of the resume form, and the page above it."""
        keys = self.ask(f"flow_runs/{run}")["state"]["state_details"]["run_input_keyset"]
        path = f"flow_runs/{run}/input"
        found = self.wait(lambda: self.filed(path, keys["description"]), lambda page: page is not None)
        return self.ask(f"{path}/{keys['schema']}"), found

    def filed(self, path: str, key: str) -> str | None:
        answer = self.request(f"{path}/{key}", None)
        return answer.json() if answer.is_success else None

    def resume(self, run: str, **run_input: str) -> None:
        self.ask(f"flow_runs/{run}/resume", {"run_input": run_input})


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("platform")
    server = Server(folder / "server")
    # A worker with a limit of its own dies where a run is resumed while its first process is still ending.
    worker = Worker(server, "cpu", folder, limit=None)
    with server.start(), worker:
        pool = ("work-pool", "create", "cpu", "--type", "process")
        deploy = ("--no-prompt", "deploy", "--all", "--prefect-file", str(re_bootstrap_alone(folder)))
        for words in (pool, deploy):
            command = [sys.executable, "-m", "prefect", *words]
            done = subprocess.run(command, env=server.client, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        worker.start()
        yield Platform(server, worker)


def processes_of(run: str) -> list[str]:
    """The processes that work on a flow run: Prefect names it in their environment."""
    mark = f"PREFECT__FLOW_RUN_ID={run}\0".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or gone
            if mark in environment.read_bytes():
                found.append(environment.parent.name)
    return found


def re_bootstrap_alone(folder: Path) -> Path:
    """prefect.yaml with this one deployment, without schedule and default parameters."""
    whole = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    (entry,) = (entry for entry in whole["deployments"] if entry["entrypoint"] == "flows.re_bootstrap.re_bootstrap")
    kept = {key: entry[key] for key in ("name", "entrypoint", "tags", "work_pool", "concurrency_limit")}
    path = folder / "prefect.yaml"
    path.write_text(yaml.safe_dump({"name": "capfilt", "deployments": [kept]}))
    return path


@pytest.fixture(scope="module")
def configured(published: Path, tiny_web: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration with given models and without a truth, on half of the rows of the tiny web."""
    folder = tmp_path_factory.mktemp("approval")
    rows = pq.read_table(tiny_web / "urls.parquet").sort_by("uid")
    pq.write_table(rows.slice(0, 20), folder / "urls.parquet")
    return {
        "workspace": str(folder / "workspace"),
        "web": {"path": str(folder / "urls.parquet"), "caption": "alt", "uid": "uid"},
        "checkpoints": {"captioner": str(published / "captioner"), "filter": str(published / "filter")},
        "download": {
            "rows_per_shard": 20,
            "image_size": 64,
            "processes": 1,
            "threads": 8,
            "retries": 0,
            "allow_private_networks": True,
        },
        "generation": {"max_length": 8, "min_length": 1},
        "annotate": {"batch_size": 16, "workers": 0},
        "publish": {"where": "hash(uid, candidate) % 3 > 0"},
        "rounds": {"approval": "required", "noise_tolerance": 1},
    }


def grow(config: dict[str, Any], tiny_web: Path, rows: int) -> None:
    """More rows in the URL table."""
    pq.write_table(pq.read_table(tiny_web / "urls.parquet").sort_by("uid").slice(0, rows), config["web"]["path"])


def test_a_deployed_round_is_promoted_when_a_person_approves_what_the_form_shows(
    platform: Platform, configured: dict[str, Any], tiny_web: Path
) -> None:
    run = platform.start(configured)
    suspended = platform.wait_suspended(run)
    assert suspended["state"]["name"] == "Suspended"
    schema, page = platform.form(run)
    assert set(schema["properties"]["decision"]["enum"]) == {"approve", "reject"}
    assert schema["required"] == ["decision"]
    assert "noise, as the Filter estimates it" in page
    assert "](data:image/" in page
    workspace = Workspace.existing(configured["workspace"])
    assert promoted_round(workspace) is None
    assert round_states(workspace)[1] == ("candidate", "waits for approval")

    platform.resume(run, decision="perhaps")
    assert platform.ask(f"flow_runs/{run}")["state"]["type"] == "PAUSED"

    # The web goes on while the round waits: what is promoted is what was shown.
    grow(configured, tiny_web, 40)
    before = [path.name for path in workspace.shard_paths()]
    platform.resume(run, decision="approve", comment="looks right")
    platform.wait_for(run, "COMPLETED")
    assert [path.name for path in workspace.shard_paths()] == before
    assert workspace.round_numbers() == [1]
    assert promoted_round(workspace) == 1
    verdict = read_json(workspace.round(1).verdict)
    assert (verdict["passed"], verdict["decided_by"]) == (True, "person")
    assert verdict["reasons"][0] == "a person approved it: looks right"


def test_a_deployed_round_that_a_person_rejects_leaves_the_old_one_promoted(
    platform: Platform, configured: dict[str, Any], tiny_web: Path
) -> None:
    grow(configured, tiny_web, 40)
    run = platform.start(configured)
    platform.wait_suspended(run)
    _, page = platform.form(run)
    assert "no worse than round 1 by 1 of 1 criteria" in page

    # Another run does not touch what waits.
    other = platform.start(configured)
    refused = platform.wait_for(other, "FAILED")
    assert f"round 2 waits for approval: resume {platform.server.ui}/runs/flow-run/{run}" in refused["state"]["message"]

    platform.resume(run, decision="reject", comment="too many dogs")
    failed = platform.wait_for(run, "FAILED")
    assert (
        "round 2 is made and not promoted; round 1 stays: a person rejected it: too many dogs"
        in (failed["state"]["message"])
    )
    workspace = Workspace.existing(configured["workspace"])
    assert promoted_round(workspace) == 1
    assert round_states(workspace)[2] == ("rejected", "a person rejected it: too many dogs")
    assert read_json(workspace.round(2).verdict)["decided_by"] == "person"


def test_a_run_of_the_command_line_waits_and_prints_where_to_answer(
    platform: Platform, configured: dict[str, Any], tiny_web: Path, tmp_path: Path
) -> None:
    grow(configured, tiny_web, 60)
    config = tmp_path / "weekly.yaml"
    config.write_text(yaml.safe_dump(configured))
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "flows", "re-bootstrap", str(config), "--json"],
            env=platform.server.client,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as program,
    ):
        told = platform.wait(log.read_text, lambda text: "waits for approval" in text or program.poll() is not None)
        address = told.partition("resume the run at ")[2].split()[0]
        run = address.rpartition("/")[2]
        assert address == f"{platform.server.ui}/runs/flow-run/{run}"
        assert platform.wait_for(run, "PAUSED")["state"]["name"] == "Paused"
        platform.form(run)
        platform.resume(run, decision="approve")
        rounds, _ = program.communicate(timeout=SECONDS)
    assert program.returncode == 0, log.read_text()
    states = [(row["round"], row["state"]) for row in yaml.safe_load(rounds)]
    assert max(states) == (max(states)[0], "promoted")
    assert promoted_round(Workspace.existing(configured["workspace"])) == max(states)[0]


def test_a_run_of_the_command_line_that_was_killed_while_it_waited_is_asked_about_again(
    configured: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "weekly.yaml"
    config.write_text(yaml.safe_dump(configured | {"workspace": str(tmp_path / "workspace")}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flows", "re-bootstrap", str(config)]
    for _ in range(2):
        with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as program:
            assert program.stderr is not None
            lines = list(takewhile(lambda line: "resume the run at" not in line, program.stderr))
            paused = wait(lambda: states_of(tmp_path / "workspace"), lambda states: "PAUSED" in states)
            program.kill()
        assert any("round 1 passes the gate" in line for line in lines), lines
    assert sorted(paused) == ["CRASHED", "PAUSED"]
    assert Workspace.existing(tmp_path / "workspace").round_numbers() == [1]


def states_of(workspace: Path) -> list[str]:
    """The states of the cycles in the history of a workspace's own server."""
    with closing(sqlite3.connect(workspace / ".prefect" / "prefect.db", timeout=60)) as history:
        found = history.execute("SELECT state_type FROM flow_run WHERE parent_task_run_id IS NULL")
        return [state for (state,) in found]
