"""The files that run the platform hold: compose, Dockerfile, Kubernetes and systemd, by schema and by each other.

Their commands, and those of the documents, exist in the programs that they name, with every option.
"""

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import typer
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.settings import Settings
from prefect.testing.utilities import prefect_test_harness
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from services.prefect import redis_messaging
from services.program import find_program

from flows.cli import app

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = ROOT / "deployments"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOYMENTS / "compose.workers.yaml").read_text())["services"]
DOCKERFILE = (DEPLOYMENTS / "Dockerfile").read_text().replace("\\\n", " ")
IGNORED = (DEPLOYMENTS / "Dockerfile.dockerignore").read_text().split()
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOYMENTS / "kubernetes" / "capfilt.yaml").read_text()))
UNITS = sorted((DEPLOYMENTS / "systemd").glob("*.service"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"capfilt:{PROJECT['version']}"
KUBERNETES_VERSIONS = ("1.31", "1.35")
ONE_SHOTS = {"migrate", "setup"}


@pytest.mark.parametrize("name", ["compose.yaml", "compose.workers.yaml"])
def test_a_compose_file_is_one(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DEPLOYMENTS / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_starts_in_order_and_what_stays_is_started_again() -> None:
    waits = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    assert waits["migrate"] == {"postgres": {"condition": "service_healthy"}}
    assert waits["api"]["migrate"] == {"condition": "service_completed_successfully"}
    assert waits["setup"] == {"api": {"condition": "service_healthy"}}
    for worker in ("worker-cpu", "worker-gpu"):
        assert waits[worker] == {"setup": {"condition": "service_completed_successfully"}}
    for name, service in SERVICES.items():
        assert service["restart"] == ("no" if name in ONE_SHOTS else "unless-stopped")
    for waited in (name for wait in waits.values() for name, how in wait.items() if "healthy" in how["condition"]):
        assert SERVICES[waited]["healthcheck"]["test"]


def test_compose_shows_the_server_to_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports == ["${CAPFILT_BIND:-127.0.0.1}:4200:4200"]


@pytest.mark.parametrize("services", [SERVICES, WORKERS], ids=["compose.yaml", "compose.workers.yaml"])
def test_a_gpu_worker_has_one_gpu_and_all_that_work_share_the_workspace(services: dict[str, Any]) -> None:
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], len(device["device_ids"]), device["capabilities"]) == ("nvidia", 1, ["gpu"])
    command = services["worker-gpu"]["command"]
    assert command[command.index("--limit") + 1] == "1"
    for name in ("worker-cpu", "worker-gpu"):
        worker = services[name]
        assert any(volume.endswith(":/workspace") for volume in worker["volumes"])
        assert worker["shm_size"] == "8gb"
        assert worker["stop_grace_period"]
        assert isinstance(worker["command"], list)  # no shell between the signal and the worker
        assert worker["image"] == IMAGE


def test_composes_server_has_the_settings_that_the_tests_run_it_with() -> None:
    environment = SERVICES["api"]["environment"]
    for name, value in redis_messaging(6379).items():
        assert environment[name] == value.replace("127.0.0.1", "redis")
    assert environment == SERVICES["services"]["environment"] == SERVICES["migrate"]["environment"]


@pytest.mark.parametrize(
    "source", ["compose.yaml", "compose.workers.yaml", "kubernetes/capfilt.yaml", "systemd/capfilt.env", "prefect.yaml"]
)
def test_every_setting_of_prefect_is_one(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / source if source == "prefect.yaml" else DEPLOYMENTS / source
    names = set(re.findall(r"\bPREFECT_[A-Z_]+\b", path.read_text()))
    assert names
    ours = {name for name in names if not name.startswith(("PREFECT_REDIS_", "PREFECT_INTEGRATIONS_"))}
    values = {"HEARTBEAT_FREQUENCY": "30", "LEASE_STORAGE": "prefect_redis.lease_storage", "EXTRA_CODES": "500"}
    for name in sorted(ours):
        kind = next((value for end, value in values.items() if name.endswith(end)), "")
        known = any(
            _takes(name, value, monkeypatch) for value in (kind, "true", "http://a/api", "sqlite+aiosqlite:///x")
        )
        assert known, name


def _takes(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as patch:
        for other in [other for other in os.environ if other.startswith("PREFECT_")]:
            patch.delenv(other)
        patch.setenv(name, value)
        try:
            return name in Settings().to_environment_variables(exclude_unset=True, include_secrets=True)
        except ValueError:
            return False


def test_the_image_copies_what_there_is_and_nothing_is_ignored_that_it_copies() -> None:
    for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in IGNORED, source
    copied = set(" ".join(re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)).split())
    assert {package.partition(".")[0] for package in _packages()} | {"deployments", "prefect.yaml"} <= copied


def _packages() -> list[str]:
    packages: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    return packages


def test_the_image_is_of_a_pinned_python_that_the_project_allows_and_runs_as_nobody_special() -> None:
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    version = re.fullmatch(r"python:(3)\.(\d+)\.(\d+)-slim-\w+", base)
    assert version, base
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    assert int(version[2]) in (11, 12)
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["capfilt"]
    assert "--uid 1000 --create-home capfilt" in DOCKERFILE
    images = [service["image"] for service in SERVICES.values()]
    assert [image for image in images if not re.search(r":\d+\.\d+", image)] == []


def test_the_image_installs_what_the_project_asks_for_in_the_tested_versions() -> None:
    (install,) = [line for line in DOCKERFILE.splitlines() if line.startswith("RUN python -c")]
    script = shlex.split(install.removeprefix("RUN "))[2]
    listed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {re.match(r"[\w-]+", line)[0].lower() for line in listed.stdout.splitlines()}  # type: ignore[index]
    assert {"torch", "prefect", "prefect-redis", "prefect-kubernetes", "s3fs"} <= names
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert names <= pinned
    steps = [step.strip() for step in install.split("&&")]
    assert steps[-2:] == ["pip uninstall --yes dataclasses", 'python -c "import prefect.server.api.server"']


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
@pytest.mark.usefixtures("prefect_server")
def test_a_job_of_the_pools_template_is_one_of_kubernetes(pool: str) -> None:
    manifest = job(pool)
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)
    spec = manifest["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert container["image"] == IMAGE
    assert container["resources"]["limits"].get("nvidia.com/gpu") == {"cpu": None, "gpu": 1}[pool]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"workspace": "/workspace", "shm": "/dev/shm"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert volumes["workspace"]["persistentVolumeClaim"]["claimName"] in names_of("PersistentVolumeClaim")
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["DO_NOT_TRACK"] == "1"
    # What Prefect's worker sets where Kubernetes itself does not try again: a preempted run is put back.
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"


@pytest.mark.usefixtures("prefect_server")
def test_a_workspace_on_s3_needs_no_claim() -> None:
    manifest = job("gpu", workspace_volume={"name": "workspace", "emptyDir": {}})
    kubernetes_validate.validate(manifest, KUBERNETES_VERSIONS[0], strict=True)
    assert "persistentVolumeClaim" not in json.dumps(manifest)


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_a_template_describes_each_of_its_variables_and_uses_it(pool: str) -> None:
    content = (DEPLOYMENTS / "kubernetes" / f"{pool}.json").read_text()
    variables = json.loads(content)["variables"]["properties"]
    assert set(re.findall(r"{{ (\w+) }}", content)) == set(variables)
    for name, variable in variables.items():
        assert variable["title"], name
        assert variable["description"], name


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A server for the worker's own code, which asks one for blocks that a template may name."""
    with prefect_test_harness():
        yield


def job(pool: str, **variables: Any) -> dict[str, Any]:
    """The job that Prefect's own worker makes of a pool's template for a flow run."""
    template = json.loads((DEPLOYMENTS / "kubernetes" / f"{pool}.json").read_text())
    values = {"env": {"DO_NOT_TRACK": "1"}, **variables}
    configuration = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, values))
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="quiet-owl"))
    manifest: dict[str, Any] = configuration.job_manifest
    return manifest


def names_of(kind: str) -> set[str]:
    return {manifest["metadata"]["name"] for manifest in MANIFESTS if manifest["kind"] == kind}


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}"
)
def test_a_manifest_is_one_of_kubernetes_in_our_namespace(manifest: dict[str, Any]) -> None:
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)
    assert manifest["metadata"].get("namespace", "capfilt") == "capfilt"
    for image in re.findall(r'"image": "([^"]+)"', json.dumps(manifest)):
        assert image == IMAGE


def test_each_pool_has_a_worker_in_the_cluster() -> None:
    containers = [m["spec"]["template"]["spec"]["containers"][0] for m in MANIFESTS if m["kind"] == "Deployment"]
    pools = [container["command"][container["command"].index("--pool") + 1] for container in containers]
    assert pools == ["cpu", "gpu"]
    for container in containers:
        (source,) = container["envFrom"]
        assert source["configMapRef"]["name"] in names_of("ConfigMap")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_is_one_of_systemd(unit: Path, tmp_path: Path) -> None:
    analyze = find_program("systemd-analyze")
    text = unit.read_text()
    assert "/opt/capfilt/.venv/bin/prefect" in text
    # systemd also asks for the program and the user, which are on the machine that the unit is for.
    here = text.replace("/opt/capfilt/.venv/bin/prefect", sys.executable).replace("User=capfilt", "User=root")
    (tmp_path / unit.name).write_text(here)
    done = subprocess.run([analyze, "verify", "--man=no", str(tmp_path / unit.name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "KillMode=mixed" in text or "worker" not in unit.name


def commands() -> set[tuple[str, ...]]:
    """The words of every `prefect` and `capfilt` command of the platform's files and of the documents."""
    services = (*SERVICES.values(), *WORKERS.values())
    found = [service["command"] for service in services if service.get("command", [""])[0] in PROGRAMS]
    specs = [m["spec"]["template"]["spec"] for m in MANIFESTS if m["kind"] in ("Deployment", "Job")]
    found += [container["command"] for spec in specs for container in spec["containers"]]
    lines = [line for unit in UNITS for line in re.findall(r"^ExecStart=\S+/bin/(.+)$", unit.read_text(), re.MULTILINE)]
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
        lines += [line for block in blocks for line in block.splitlines()]
    found += [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] in PROGRAMS]
    return {tuple(words) for words in found}


PROGRAMS = ("prefect", "capfilt")
COMMANDS = sorted(commands())


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "prefect"], ids=" ".join)
def test_a_prefect_command_exists_with_its_options(words: tuple[str, ...]) -> None:
    rest = [word for word in words[1:] if word != "--no-prompt"]
    path = tuple(word for word in rest[: _first(rest)])
    options = {word for word in rest if re.fullmatch(r"--[a-z-]+", word)}
    assert path
    assert options - set(re.findall(r"--[a-z-]+", help_of(path))) == set()


def _first(words: list[str]) -> int:
    """Where the names of a command end: at an option, or at a word that no command is called."""
    return next((place for place, word in enumerate(words) if not re.fullmatch(r"[a-z]+(-[a-z]+)*", word)), len(words))


@cache
def help_of(path: tuple[str, ...]) -> str:
    command = [sys.executable, "-m", "prefect", *path, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == 0, done.stderr
    assert f"Usage: prefect {path[0]}" in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    "words", [words for words in COMMANDS if words[:2] == ("capfilt", "setup-prefect")], ids=" ".join
)
def test_a_set_up_has_options_that_there_are(words: tuple[str, ...]) -> None:
    command = typer.main.get_command(app).commands["setup-prefect"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= options
