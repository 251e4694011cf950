"""Publishing: the corpus part of one shard, the human pairs, and the catalog over all of it."""

import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.corpus import catalog, left_out, selection
from blip_core.corpus.rules import looks_across
from blip_core.data.denied import read_denied
from blip_core.errors import CapfiltError
from tasks import progress
from tasks.each import each_of
from tasks.workplace import add_seconds, human_pairs, round_of, shard_names, workspace_of


@task(name="compare-images", task_run_name="compare-images", cache_policy=NO_CACHE)
def compare_images(config: BootstrapConfig) -> left_out.Compared:
    """Writes which images the corpus leaves out because of others, of whatever shard."""
    began = time.monotonic()
    found = left_out.compare_round(workspace_of(config), config.round, shard_names(config), config.publish)
    if not found.skipped:
        add_seconds(config, "publish", time.monotonic() - began)
        progress.say(
            f"{found.images} images compared, {_told(sum(found.left_out.values()), 'left out', found.left_out)}"
        )
    return found


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
    rules = config.publish
    across = looks_across(rules.images)
    summary = selection.publish_shard(
        current.annotations / f"{name}.parquet",
        workspace_of(config).shard(name),
        current.corpus / f"{name}.parquet",
        rules.where,
        config.round,
        rules.best_of,
        rules.text,
        rules.images,
        left_out.read_left_out(left_out.part_of(current, name)) if across else None,
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
        told = _told(summary.rejected, "rejected", summary.by_reason)
        progress.say(f"{summary.shard}: {summary.kept} kept, {told}")


def _told(total: int, what: str, reasons: dict[str, int]) -> str:
    each = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{total} {what}{f' ({each})' if each else ''}"
