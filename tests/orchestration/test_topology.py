"""What deployments/compose.yaml describes, of plain processes: PostgreSQL, Redis, server, and a worker of each pool.

A cycle started at the server goes through both pools, and ends there.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from services.postgres import DATABASE, USER, Postgres, postgres
from services.prefect import Server, Worker, redis_messaging
from services.redis import redis

from blip_core.corpus.query import run_query
from blip_core.workspace import Workspace

ROOT = Path(__file__).parents[2]
END_SECONDS = 270.0
ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Topology(NamedTuple):
    server: Server
    database: Postgres
    workspace: Path
    logs: Callable[[], str]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url = f"{self.server.api}/{path}"
        method = "GET" if body is None else "POST"
        answer = httpx.request(method, url, json=body, timeout=60, trust_env=False)
        assert answer.is_success, answer.text
        return answer.json()

    def run(self, name: str) -> Any:
        """Runs a deployment as the UI does, with its default parameters, and returns the run when it has ended."""
        deployment = self.ask(f"deployments/name/{name}")
        run = self.ask(f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        deadline = time.monotonic() + END_SECONDS
        while run["state"]["type"] not in ENDS:
            assert time.monotonic() < deadline, f"{name} is {run['state']['name']}\n{self.logs()}"
            time.sleep(1)
            run = self.ask(f"flow_runs/{run['id']}")
        return run


@pytest.fixture(scope="module")
def topology(published: Path, tiny_web: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    folder = tmp_path_factory.mktemp("topology")
    config = folder / "clean.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "workspace": str(folder / "work"),
                "web": {"path": str(tiny_web / "urls.parquet"), "caption": "alt", "uid": "uid"},
                "checkpoints": {"captioner": str(published / "captioner"), "filter": str(published / "filter")},
                "download": {"rows_per_shard": 40, "processes": 1, "threads": 8, "retries": 0},
                "generation": {"max_length": 6},
                "annotate": {"precision": "fp32", "workers": 0, "batch_size": 16},
                "scale": {"poll_seconds": 1.0},
            }
        )
    )
    with postgres() as database, redis(folder) as messages:
        server = Server(folder / "server", database.url, redis_messaging(messages.port))
        workers = [Worker(server, pool, folder / pool) for pool in ("cpu", "gpu")]

        def logs() -> str:
            return "\n".join(worker.log.read_text(errors="replace")[-4000:] for worker in workers)

        with server.start():
            _do(server, folder, sys.executable, "-m", "flows", "setup-prefect", "--gpus", "1", "--no-deploy")
            deploy = ("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(ROOT / "prefect.yaml"))
            _do(server, folder, sys.executable, "-m", *deploy, CAPFILT_CONFIG=str(config))
            with workers[0], workers[1]:
                for worker in workers:
                    worker.start()
                yield Topology(server, database, folder / "work", logs)


def _do(server: Server, folder: Path, *command: str, **environment: str) -> None:
    done = subprocess.run(
        command, env=server.client | environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_a_cycle_conducts_from_one_pool_and_its_gpu_work_is_done_in_the_other(topology: Topology) -> None:
    run = topology.run("clean/capfilt")
    assert run["state"]["type"] == "COMPLETED", f"{run['state']}\n{topology.logs()}"
    assert run["work_pool_name"] == "cpu"
    batches = [child for child in topology.ask("flow_runs/filter", {}) if child["work_pool_name"] == "gpu"]
    assert batches
    assert {batch["state"]["type"] for batch in batches} == {"COMPLETED"}
    assert {batch["work_queue_name"] for batch in batches} == {"batches"}
    rows = run_query(Workspace.existing(str(topology.workspace)), "SELECT count(*) AS n FROM annotations").to_pylist()
    assert rows[0]["n"] > 0


@pytest.mark.timeout(600)
def test_single_steps_run_in_each_pool_and_find_done_what_is_done(topology: Topology) -> None:
    before = {path: path.stat().st_mtime_ns for path in topology.workspace.rglob("*.parquet")}
    for name, pool in (("annotate/capfilt", "gpu"), ("publish/capfilt", "cpu")):
        run = topology.run(name)
        assert run["state"]["type"] == "COMPLETED", f"{run['state']}\n{topology.logs()}"
        assert run["work_pool_name"] == pool
    assert {path: path.stat().st_mtime_ns for path in topology.workspace.rglob("*.parquet")} == before


def test_a_dump_of_the_database_brings_the_history_back(topology: Topology, tmp_path: Path) -> None:
    bin = Path(topology.database.command[0]).parent
    login = ("--host", "127.0.0.1", "--port", str(topology.database.port), "--username", USER)
    dump = tmp_path / "prefect.dump"
    history = _history(topology.server)
    assert history
    for command in (
        ("pg_dump", *login, "--format", "custom", "--file", str(dump), DATABASE),
        ("createdb", *login, "restored"),
        ("pg_restore", *login, "--dbname", "restored", "--clean", "--if-exists", str(dump)),
    ):
        subprocess.run([str(bin / command[0]), *command[1:]], check=True, capture_output=True)
    restored = Server(tmp_path / "restored", topology.database.url.replace(f"/{DATABASE}", "/restored"))
    with restored.start():
        assert _history(restored) == history
        assert list((tmp_path / "restored").glob("*.db")) == []


def _history(server: Server) -> dict[str, str]:
    """The state of every flow run, by its id."""
    answer = httpx.post(f"{server.api}/flow_runs/filter", json={}, timeout=60, trust_env=False)
    return {run["id"]: run["state"]["type"] for run in answer.json()}
