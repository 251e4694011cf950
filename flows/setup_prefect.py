"""`capfilt setup-prefect`: what flows need at a Prefect server and prefect.yaml cannot hold, and then prefect.yaml.

Work pools with their limits, queues, automations, deployments. Nothing is made twice: what stands is found, and
changed where another number is asked for. Works through Prefect's client alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from blip_core.errors import CapfiltError, ConfigError
from flows.automations import START_SECONDS, ensure_automations
from flows.presets import ROOT, read_preset
from flows.server import check_answers, configured_api

PoolType = Literal["process", "kubernetes"]
Become = Literal["made", "changed", "found"]

PREFECT_FILE = ROOT / "prefect.yaml"
TEMPLATES = ROOT / "deployments" / "kubernetes"
CPU_RUNS = 4
# A job may wait for its machine: clusters add and remove GPU nodes.
KUBERNETES_START_SECONDS = 1800
# What a server changes by itself, or by the mere sending.
_PASSING = {"updated", "last_polled", "status", "schedules", "version_id", "version_info", "updated_by"}


@dataclass(frozen=True)
class Part:
    """One thing at the server: its kind and name, what became of it, and a word on how it stands now."""

    kind: str
    name: str
    became: Become
    note: str


@dataclass(frozen=True)
class _Queue:
    name: str
    priority: int
    description: str


@dataclass(frozen=True)
class _Pool:
    name: str
    description: str
    limit: int | None
    default_limit: Callable[[], int]
    queues: tuple[_Queue, ...] = ()


def setup_prefect(
    pool_type: PoolType, gpus: int | None, cpu_limit: int | None, deploy: bool, config: Path | None
) -> list[Part]:
    """Sets up the configured Prefect server, and says what was made, changed and found.

    Args:
        pool_type: of both work pools; kubernetes takes its job templates from deployments/kubernetes.
        gpus: runs at a time in the pool `gpu`; None: as it stands, and at first the GPUs of this machine, at least 1.
        cpu_limit: the same in the pool `cpu`; None: as it stands, and at first CPU_RUNS.
        deploy: whether prefect.yaml is deployed too.
        config: the configuration that deployments have as default; None: the presets.

    Raises ConfigError where no server is configured, it does not answer or refuses, a pool of another type stands,
    or the configuration is wrong; CapfiltError where deploying fails.
    """
    if deploy:
        _check_files(config)
    pools = [
        _Pool("cpu", "Cycles, downloads and SQL", cpu_limit, lambda: CPU_RUNS),
        _Pool(
            "gpu",
            "Trainings and annotation: one run for each GPU",
            gpus,
            _gpus,
            # `default` is made with the pool and has priority 1.
            (_Queue("batches", 2, "Batches of annotation, after whatever waits in `default`"),),
        ),
    ]
    with _server() as client:
        parts = [part for pool in pools for part in _ensure_pool(client, pool, pool_type)]
        parts += _watched(client, "automation", _automations, lambda: _make_automations(client, pool_type))
        if deploy:
            parts += _watched(client, "deployment", _deployments, lambda: _deploy(config))
    return parts


def _check_files(config: Path | None) -> None:
    """Raises ConfigError for what deploying would fail at when half of it is done."""
    if not PREFECT_FILE.is_file():
        raise ConfigError(f"{PREFECT_FILE}: missing; deploy from a checkout of the project, or use --no-deploy")
    read_preset("clean", config=str(config or ""))


@contextmanager
def _server() -> Iterator[SyncPrefectClient]:
    api = configured_api()
    if api is None:
        raise ConfigError(
            "PREFECT_API_URL: not set, and setup-prefect needs a server that stays; start one by `prefect server "
            "start`, and set it to http://127.0.0.1:4200/api"
        )
    check_answers(api)
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.HTTPStatusError as error:
        raise ConfigError(f"the Prefect server at {api} refuses: {error}") from error
    except httpx.TransportError as error:
        raise ConfigError(f"the Prefect server at {api} does not answer any more ({error})") from error


def _ensure_pool(client: SyncPrefectClient, pool: _Pool, pool_type: PoolType) -> Iterator[Part]:
    try:
        standing = client.read_work_pool(pool.name)
    except ObjectNotFound:
        limit = pool.limit or pool.default_limit()
        client.create_work_pool(
            WorkPoolCreate(
                name=pool.name,
                type=pool_type,
                description=pool.description,
                concurrency_limit=limit,
                base_job_template=_template(pool, pool_type),
            )
        )
        yield Part("work pool", pool.name, "made", _note(pool_type, limit))
    else:
        yield _update_pool(client, pool, pool_type, standing)
    for queue in pool.queues:
        yield _ensure_queue(client, pool, queue)


def _update_pool(client: SyncPrefectClient, pool: _Pool, pool_type: PoolType, standing: WorkPool) -> Part:
    if standing.type != pool_type:
        raise ConfigError(
            f"work pool {pool.name}: is of type {standing.type}, which cannot be changed to {pool_type}; remove it "
            f"first, by: prefect work-pool delete {pool.name}"
        )
    changes: dict[str, Any] = {}
    if pool.limit not in (None, standing.concurrency_limit):
        changes["concurrency_limit"] = pool.limit
    # A process pool's template is Prefect's own, and whoever changed it meant to.
    if pool_type == "kubernetes" and standing.base_job_template != _template(pool, pool_type):
        changes["base_job_template"] = _template(pool, pool_type)
    if changes:
        client.update_work_pool(pool.name, WorkPoolUpdate(**changes))
    limit = changes.get("concurrency_limit", standing.concurrency_limit)
    return Part("work pool", pool.name, "changed" if changes else "found", _note(pool_type, limit))


def _ensure_queue(client: SyncPrefectClient, pool: _Pool, queue: _Queue) -> Part:
    try:
        standing = client.read_work_queue_by_name(queue.name, work_pool_name=pool.name)
    except ObjectNotFound:
        client.create_work_queue(
            queue.name, description=queue.description, priority=queue.priority, work_pool_name=pool.name
        )
        return Part("queue", f"{pool.name}/{queue.name}", "made", f"priority {queue.priority}")
    return Part("queue", f"{pool.name}/{queue.name}", "found", f"priority {standing.priority}")


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _template(pool: _Pool, pool_type: PoolType) -> dict[str, Any]:
    if pool_type == "process":
        return ProcessWorker.get_default_base_job_template()
    template: dict[str, Any] = json.loads((TEMPLATES / f"{pool.name}.json").read_text())
    return template


def _note(pool_type: str, limit: int | None) -> str:
    return f"{pool_type}, " + ("any number of runs" if limit is None else f"{limit} at a time")


def _watched(
    client: SyncPrefectClient,
    kind: str,
    read: Callable[[SyncPrefectClient], dict[str, tuple[Any, str]]],
    act: Callable[[], object],
) -> list[Part]:
    """Acts, and tells from what `read` gives before and after what became of each."""
    before = read(client)
    act()
    parts = []
    for name, (state, note) in sorted(read(client).items()):
        became: Become = "made" if name not in before else "found" if before[name][0] == state else "changed"
        parts.append(Part(kind, name, became, note))
    return parts


def _automations(client: SyncPrefectClient) -> dict[str, tuple[Any, str]]:
    return {
        automation.name: (automation.model_dump(exclude=_PASSING), "on" if automation.enabled else "off")
        for automation in client.read_automations()
        if automation.name.startswith("capfilt")
    }


def _make_automations(client: SyncPrefectClient, pool_type: PoolType) -> None:
    start_s = KUBERNETES_START_SECONDS if pool_type == "kubernetes" else START_SECONDS
    ensure_automations(client, start_s=start_s)


def _deployments(client: SyncPrefectClient) -> dict[str, tuple[Any, str]]:
    found = {}
    for name in _deployment_names():
        with suppress(ObjectNotFound):
            deployment = client.read_deployment_by_name(name)
            schedules = [(schedule.slug, schedule.schedule, schedule.active) for schedule in deployment.schedules]
            found[name] = ((deployment.model_dump(exclude=_PASSING), schedules), _where(deployment))
    return found


def _deployment_names() -> list[str]:
    entries = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]
    return [f"{entry['entrypoint'].rpartition('.')[2].replace('_', '-')}/{entry['name']}" for entry in entries]


def _where(deployment: Any) -> str:
    scheduled = [f"schedule {schedule.slug} {'on' if schedule.active else 'off'}" for schedule in deployment.schedules]
    return ", ".join([f"in {deployment.work_pool_name}/{deployment.work_queue_name}", *scheduled])


def _deploy(config: Path | None) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    environment = {**os.environ, "CAPFILT_CONFIG": str(config.absolute()) if config else ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise CapfiltError(f"deploying {PREFECT_FILE} failed: {' '.join(lines[-3:])}")
