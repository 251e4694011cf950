"""Downloading: the plan of the missing shards, and one shard at a time, tried again where the network fails."""

import random
import time

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import exponential_backoff

from blip_core.config import BootstrapConfig
from blip_core.corpus.catalog import build_catalog
from blip_core.data import download, retry
from blip_core.data.shards import RETRY_PREFIX
from blip_core.errors import CapfiltError, DownloadError
from tasks import progress
from tasks.each import each_of
from tasks.workplace import add_seconds, shards_before, workspace_of


def network_failed(task: Task, run: TaskRun, state: State) -> bool:
    """Only what the world did wrong is worth another try."""
    failure = state.result(raise_on_failure=False)
    if isinstance(failure, DownloadError):
        progress.say(f"{failure}; try {run.run_count} of {DOWNLOAD_TRIES}")
    return isinstance(failure, DownloadError)


DOWNLOAD_TRIES = 4
_BACKOFF = 5.0  # seconds before the second try, then twice as many
_JITTER = 0.5  # hosts are not asked by all at the same moment


@task(name="plan-shards", task_run_name="plan-shards", cache_policy=NO_CACHE)
def plan_shards(config: BootstrapConfig) -> download.DownloadPlan:
    """Groups the URL table's rows into shards and says which of them are missing."""
    plan = download.plan_shards(config.web, config.download, workspace_of(config), shards_before(config))
    known = f"; {plan.known_url} left out (known_url)" if plan.known_url else ""
    progress.say(
        f"download: {plan.rows} rows, {plan.missing} of them to fetch in {len(plan.names)} shards; {len(plan.done)} "
        f"shards stand{known}"
    )
    return plan


@task(name="plan-retry", task_run_name="plan-retry", cache_policy=NO_CACHE)
def plan_retry(config: BootstrapConfig) -> download.DownloadPlan:
    """Groups the rows that failed in written shards for a passing reason into further shards."""
    workspace = workspace_of(config)
    plan = retry.plan_retry(config.web, config.download, workspace)
    if plan.names:
        build_catalog(workspace)  # before the first of them stands: a row must never be shown twice
    progress.say(
        f"download: {plan.missing} rows failed for a passing reason and are tried again, in {len(plan.names)} shards; "
        f"{len(plan.done)} shards stand"
    )
    return plan


@task(
    name="download-shard",
    task_run_name="download-{name}",
    cache_policy=NO_CACHE,
    retries=DOWNLOAD_TRIES - 1,
    retry_delay_seconds=exponential_backoff(backoff_factor=_BACKOFF),
    retry_jitter_factor=_JITTER,
    retry_condition_fn=network_failed,
)
def download_shard(config: BootstrapConfig, name: str) -> download.ShardSummary:
    """Fetches the images of one shard over the network."""
    return _fetch(config, name)


@task(name="download-batch", task_run_name="download-{names[0]}", cache_policy=NO_CACHE)
def download_batch(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
    """Fetches some shards, one after the other, each as patiently as a task of its own; returns the failures."""
    return each_of(names, lambda name: _patiently(config, name))


def _patiently(config: BootstrapConfig, name: str) -> None:
    delays = exponential_backoff(backoff_factor=_BACKOFF)(DOWNLOAD_TRIES - 1)
    for tries, delay in enumerate(delays, start=1):
        try:
            _fetch(config, name)
        except DownloadError as failure:
            progress.say(f"{failure}; try {tries} of {DOWNLOAD_TRIES}")
            time.sleep(delay * random.uniform(1, 1 + _JITTER))
        else:
            return
    _fetch(config, name)


def _fetch(config: BootstrapConfig, name: str) -> download.ShardSummary:
    work = retry.retry_shard if name.startswith(RETRY_PREFIX) else download.download_shard
    summary = work(
        workspace_of(config),
        name,
        config.download,
        lambda images: progress.at("download", name, images),
        shards_before(config),
        config.scale.ray_address if config.engine == "ray" else None,
    )
    progress.at("download", name, summary.rows)
    if not summary.skipped:
        add_seconds(config, "download", summary.seconds)
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary.reasons.items())
        progress.say(f"shard {name}: {summary.ok} of {summary.rows} images{f' ({reasons})' if reasons else ''}")
    return summary
