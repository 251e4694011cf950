"""deployments/compose.yaml by its own commands, as plain processes: PostgreSQL, Redis, server, set-up, two workers.

A cycle started at the server goes through both pools, and ends there.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from services.postgres import DATABASE, USER, Postgres, postgres
from services.prefect import Server, Worker, redis_messaging
from services.program import Program
from services.redis import redis

from blip_core.corpus.query import run_query
from blip_core.workspace import Workspace
from flows.server import free_port

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text())["services"]
SERVER_SETTINGS: dict[str, str] = SERVICES["api"]["environment"]
MODULES = {"prefect": "prefect", "capfilt": "flows"}
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
                "download": {
                    "rows_per_shard": 40,
                    "processes": 1,
                    "threads": 8,
                    "retries": 0,
                    "allow_private_networks": True,
                },
                "generation": {"max_length": 6},
                "annotate": {"precision": "fp32", "workers": 0, "batch_size": 16},
                "scale": {"poll_seconds": 1.0},
            }
        )
    )
    with postgres() as database, redis(folder) as messages, ExitStack() as running:
        settings = {name: SERVER_SETTINGS[name] for name in SERVER_SETTINGS if name.endswith("MIGRATE_ON_START")}
        server = Server(folder / "server", database.url, settings | redis_messaging(messages.port))
        port = server.api.split(":")[2].removesuffix("/api")
        server.command = command("api", {"0.0.0.0": "127.0.0.1", "4200": port})
        _do(command("migrate"), folder, server.environment)
        running.enter_context(server.start())
        _do([sys.executable, *check("api", "4200", port)], folder, server.environment)
        services = Program(command("services"), folder / "services.log", environment=server.environment)
        running.enter_context(services.start())
        _do(command("setup"), folder, server.client | {"CAPFILT_CONFIG": str(config)})
        workers = [_worker(server, pool, folder / pool) for pool in ("cpu", "gpu")]
        for worker in workers:
            running.enter_context(worker.start())
            health = worker.environment["PREFECT_WORKER_WEBSERVER_PORT"]
            _do([sys.executable, *check(f"worker-{worker.log.parent.name}", "8080", health)], folder, server.client)
        yield Topology(
            server,
            database,
            folder / "work",
            lambda: "\n".join(worker.log.read_text(errors="replace")[-4000:] for worker in workers),
        )


def command(service: str, changes: Mapping[str, str] | None = None) -> list[str]:
    """The command of a compose service, run by this Python, its variables at their defaults."""
    program, *words = (re.sub(r"\${\w+:-(.*?)}", r"\1", word) for word in SERVICES[service]["command"])
    return [sys.executable, "-m", MODULES[program], *((changes or {}).get(word, word) for word in words)]


def check(service: str, port: str, ours: str) -> list[str]:
    """The arguments of the Python that checks a compose service's health, at another port."""
    kind, program, *words = SERVICES[service]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    return [word.replace(f":{port}/", f":{ours}/") for word in words]


def _worker(server: Server, pool: str, folder: Path) -> Worker:
    worker = Worker(server, pool, folder, settings={"PREFECT_WORKER_WEBSERVER_PORT": str(free_port())})
    worker.command = command(f"worker-{pool}")
    return worker


def _do(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"


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
