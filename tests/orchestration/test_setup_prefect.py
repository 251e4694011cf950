"""`capfilt setup-prefect` on a real server: what it makes, that it makes nothing twice, and what is refused then."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from services.prefect import Server

from flows.server import free_port

ROOT = Path(__file__).parents[2]
DEPLOYED = {
    f"{entry['entrypoint'].rpartition('.')[2].replace('_', '-')}/capfilt"
    for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
}
TEMPLATES = ROOT / "deployments" / "kubernetes"
WEEKLY = "re-bootstrap/capfilt"


class Platform:
    """A server to set up, asked over its API."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.parts: dict[tuple[str, str], tuple[str, str]] = {}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command's end; for a set-up that is to succeed, `set_up`."""
        command = [sys.executable, "-m", "flows", "setup-prefect", *arguments]
        return subprocess.run(
            command, env=self.server.client, cwd=self.folder, capture_output=True, text=True, check=False, timeout=240
        )

    def set_up(self, *arguments: str) -> dict[tuple[str, str], tuple[str, str]]:
        """(kind, name) to (what became of it, note)."""
        done = self.run("--json", *arguments)
        assert done.returncode == 0, done.stderr
        return {(part["kind"], part["name"]): (part["became"], part["note"]) for part in json.loads(done.stdout)}

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str = "") -> Any:
        answer = self.send(path, body, method)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def send(self, path: str, body: dict[str, Any] | None = None, method: str = "") -> httpx.Response:
        method = method or ("GET" if body is None else "POST")
        return httpx.request(method, f"{self.server.api}/{path}", json=body, timeout=60, trust_env=False)

    def deployment(self, name: str) -> Any:
        return self.ask(f"deployments/name/{name}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A server, set up once with nothing said."""
    folder = tmp_path_factory.mktemp("platform")
    with Server(folder / "server") as server:
        server.start()
        platform = Platform(server, folder)
        platform.parts = platform.set_up()
        yield platform


def test_pools_queues_automations_and_deployments_are_made(made: Platform) -> None:
    assert {became for became, _ in made.parts.values()} == {"made"}
    assert {name for kind, name in made.parts if kind == "deployment"} == DEPLOYED
    pools = {pool["name"]: pool for pool in made.ask("work_pools/filter", {})}
    assert {name: pool["type"] for name, pool in pools.items()} == {"cpu": "process", "gpu": "process"}
    assert pools["gpu"]["concurrency_limit"] >= 1
    assert pools["cpu"]["concurrency_limit"] == 4
    assert "env" in pools["gpu"]["base_job_template"]["variables"]["properties"]
    queues = {queue["name"]: queue["priority"] for queue in made.ask("work_pools/gpu/queues/filter", {})}
    assert queues["default"] < queues["batches"]
    automations = made.ask("automations/filter", {})
    assert {automation["name"] for automation in automations} == {
        name for kind, name in made.parts if kind == "automation"
    }
    assert automations


def test_again_finds_everything_changes_the_numbers_asked_for_and_keeps_them(made: Platform) -> None:
    (schedule,) = made.deployment(WEEKLY)["schedules"]
    assert (schedule["slug"], schedule["active"]) == ("weekly", False)
    path = f"deployments/{made.deployment(WEEKLY)['id']}/schedules/{schedule['id']}"
    made.ask(path, {"active": True}, "PATCH")  # as the switch in the UI does

    again = made.set_up("--gpus", "3", "--cpu-limit", "5")

    assert again.keys() == made.parts.keys()
    assert {name for (_, name), (became, _) in again.items() if became != "found"} == {"cpu", "gpu"}
    assert again["work pool", "gpu"] == ("changed", "process, 3 at a time")
    assert again["work pool", "cpu"] == ("changed", "process, 5 at a time")
    (schedule,) = made.deployment(WEEKLY)["schedules"]
    assert schedule["active"]
    assert made.ask("work_pools/gpu")["concurrency_limit"] == 3
    assert {became for became, _ in made.set_up("--no-deploy").values()} == {"found"}
    assert made.ask("work_pools/gpu")["concurrency_limit"] == 3
    assert len(made.ask("automations/filter", {})) == len([kind for kind, _ in made.parts if kind == "automation"])


def test_a_second_round_waits_for_the_first(made: Platform) -> None:
    deployment = made.deployment(WEEKLY)
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    parameters = {"config": {**deployment["parameters"]["config"], "workspace": "w"}}
    parameters["config"]["web"] = {**parameters["config"]["web"], "path": "urls.parquet"}
    first, second = (
        made.ask(f"deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"] for _ in range(2)
    )

    def take(run: str) -> str:
        """What a worker does before it starts a run, and the state that the run then has."""
        made.ask(f"flow_runs/{run}/set_state", {"state": {"type": "PENDING"}})
        return str(made.ask(f"flow_runs/{run}")["state"]["name"])

    assert take(first) == "Pending"
    assert take(second) == "AwaitingConcurrencySlot"
    made.ask(f"flow_runs/{first}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
    assert take(second) == "Pending"


def test_a_configuration_of_ones_own_becomes_what_runs_begin_with(made: Platform) -> None:
    (made.folder / "mine.yaml").write_text(
        "workspace: work\nweb: {path: urls.parquet}\npublish: {where: itm_score > 0.7}\n"
    )
    again = made.set_up("mine.yaml")
    assert again["deployment", "clean/capfilt"][0] == "changed"
    assert again["deployment", "demo/capfilt"][0] == "found"
    config = made.deployment("clean/capfilt")["parameters"]["config"]
    assert config["workspace"] == str(made.folder / "work")
    assert config["web"]["path"] == str(made.folder / "urls.parquet")
    assert config["publish"]["where"] == "itm_score > 0.7"


@pytest.mark.parametrize("name", sorted(DEPLOYED))
def test_the_form_of_a_run_tells_title_description_default_and_limits_of_every_field(made: Platform, name: str) -> None:
    schema = made.deployment(name)["parameter_openapi_schema"]
    assert "config" in schema["properties"]
    fields = [
        (f"{section}.{key}", field, key in definition.get("required", []))
        for section, definition in schema["definitions"].items()
        for key, field in definition["properties"].items()
    ]
    assert len(fields) > 100
    fields += [(key, field, True) for key, field in schema["properties"].items() if "type" in field]
    for key, field, required in fields:
        kinds = [option for option in (field, *field.get("anyOf", [])) if option.get("type", "null") != "null"]
        assert field["description"], key
        if not kinds:  # a section, whose fields are told in their turn
            assert "$ref" in json.dumps(field), key
            continue
        assert field["title"], key
        assert required or "default" in field, key
        for kind in ({**option, **field} for option in kinds if option["type"] in ("integer", "number")):
            assert {"minimum", "exclusiveMinimum"} & kind.keys(), key


REFUSED = {
    "pretrain.steps": (-1, "pretrain.steps"),
    "download.threads": ("many", "download.threads"),
    "annotate.precision": ("fp64", "annotate.precision"),
    "publish.were": ("itm_score > 0.9", "were"),
    "colour": ("red", "colour"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_bad_value_is_refused_by_the_server_before_there_is_a_run(made: Platform, key: str) -> None:
    deployment = made.deployment("bootstrap/capfilt")
    config = deployment["parameters"]["config"] | {"workspace": "w"}
    config["web"] = {**config["web"], "path": "urls.parquet"}
    good = made.send(f"deployments/{deployment['id']}/create_flow_run", {"parameters": {"config": config}})
    assert good.is_success, good.text
    runs = made.ask("flow_runs/count", {})
    value, named = REFUSED[key]
    *sections, last = key.split(".")
    inner = config
    for section in sections:
        inner[section] = dict(inner[section])
        inner = inner[section]
    inner[last] = value

    answer = made.send(f"deployments/{deployment['id']}/create_flow_run", {"parameters": {"config": config}})

    assert answer.status_code in (409, 422)
    assert named in answer.text
    assert made.ask("flow_runs/count", {}) == runs


@pytest.mark.parametrize("key", REFUSED)
def test_a_bad_value_is_refused_by_the_command_line_before_anything_is_started(
    key: str, capfilt: Callable[..., tuple[int, str, str]], configure: Callable[..., Path]
) -> None:
    value, named = REFUSED[key]
    status, out, err = capfilt("bootstrap", str(configure()), "--set", f"{key}={json.dumps(value)}")
    assert (status, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1


def test_a_pool_of_another_type_is_named_with_the_remedy(made: Platform) -> None:
    refused = made.run("--type", "kubernetes", "--no-deploy")
    assert refused.returncode == 2
    assert "work pool cpu: is of type process" in refused.stderr
    assert "prefect work-pool delete cpu" in refused.stderr
    assert made.ask("work_pools/cpu")["type"] == "process"


def test_kubernetes_pools_have_the_templates_of_the_repository(tmp_path: Path) -> None:
    with Server(tmp_path / "server") as server:
        server.start()
        on_kubernetes = Platform(server, tmp_path)
        parts = on_kubernetes.set_up("--type", "kubernetes", "--gpus", "64")
        assert parts["work pool", "gpu"] == ("made", "kubernetes, 64 at a time")
        for pool in ("cpu", "gpu"):
            template = json.loads((TEMPLATES / f"{pool}.json").read_text())
            assert on_kubernetes.ask(f"work_pools/{pool}")["base_job_template"] == template
        again = on_kubernetes.set_up("--type", "kubernetes", "--no-deploy")
        assert {became for became, _ in again.values()} == {"found"}
        assert on_kubernetes.deployment("pretrain/capfilt")["work_pool_name"] == "gpu"


@pytest.mark.usefixtures("_unset")
def test_without_a_server_the_command_says_what_to_start(capfilt: Callable[..., tuple[int, str, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.setup_prefect.configured_api", lambda: None)
        status, _, err = capfilt("setup-prefect")
    assert status == 2
    assert "PREFECT_API_URL" in err
    assert "prefect server start" in err
    assert err.count("\n") == 1


def test_a_server_that_does_not_answer_is_named() -> None:
    api = f"http://127.0.0.1:{free_port()}/api"
    command = [sys.executable, "-m", "flows", "setup-prefect"]
    environment = {**os.environ, "PREFECT_API_URL": api}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert api in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.usefixtures("_unset")
def test_a_bad_configuration_is_refused_before_the_server_is_touched(
    capfilt: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("pretrain: {steps: -1}\n")
    status, _, err = capfilt("setup-prefect", str(tmp_path / "bad.yaml"))
    assert status == 2
    assert "pretrain.steps" in err
    assert "bad.yaml" in err


@pytest.fixture
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back what the command sets in the environment."""
    for name in ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "NO_PROXY", "no_proxy", "PREFECT_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
