"""Publishing: the corpus part of one shard, the human pairs, and the catalog over all of it."""

import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.corpus import catalog, selection
from blip_core.data.denied import read_denied
from blip_core.errors import CapfiltError
from tasks import progress
from tasks.each import each_of
from tasks.workplace import add_seconds, human_pairs, round_of, workspace_of


@task(name="publish-shard", task_run_name="publish-{name}", cache_policy=NO_CACHE)
def publish_shard(config: BootstrapConfig, name: str) -> selection.PublishSummary:
    """Writes the candidates of one shard that pass the predicate."""
    return _publish(config, name)


@task(name="publish-batch", task_run_name="publish-{names[0]}", cache_policy=NO_CACHE)
def publish_batch(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
    """The same for some shards, one after the other; returns the failures by shard."""
    return each_of(names, lambda name: _publish(config, name))


def _publish(config: BootstrapConfig, name: str) -> selection.PublishSummary:
    began = time.monotonic()
    current = round_of(config)
    summary = selection.publish_shard(
        current.annotations / f"{name}.parquet",
        workspace_of(config).shard(name),
        current.corpus / f"{name}.parquet",
        config.publish.where,
        config.round,
        config.publish.best_of,
        read_denied(workspace_of(config)),
    )
    _report(config, summary, time.monotonic() - began)
    progress.at("publish", name, 1)
    return summary


@task(name="publish-human", task_run_name="publish-human", cache_policy=NO_CACHE)
def publish_human(config: BootstrapConfig) -> selection.PublishSummary:
    """Writes the human pairs into the corpus."""
    began = time.monotonic()
    summary = selection.publish_human(
        human_pairs(config), round_of(config).corpus, config.round, read_denied(workspace_of(config))
    )
    _report(config, summary, time.monotonic() - began)
    return summary


@task(name="build-catalog", task_run_name="build-catalog", cache_policy=NO_CACHE)
def build_catalog(config: BootstrapConfig) -> Path:
    """Writes the DuckDB catalog over the workspace."""
    return catalog.build_catalog(workspace_of(config))


def _report(config: BootstrapConfig, summary: selection.PublishSummary, seconds: float) -> None:
    if not summary.skipped:
        add_seconds(config, "publish", seconds)
        progress.say(f"{summary.shard}: {summary.kept} kept, {summary.rejected} rejected")
