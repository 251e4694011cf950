"""Annotating: the shards whose parts are missing, and a batch of them in one task, the models loaded once."""

from collections.abc import Iterable
from typing import NamedTuple

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.capfilt.annotate import AnnotationSummary, FailedShard, annotate_shards, standing_part
from blip_core.capfilt.reading import ShardJob, count_images
from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from blip_core.workspace import Workspace
from tasks import progress
from tasks.models import load_models, model_digests
from tasks.workplace import add_images, add_seconds, shard_names, workspace_of


class AnnotationPlan(NamedTuple):
    """What there is to annotate: shards and images, and of both what stands already."""

    names: list[str]
    images: int
    standing_names: list[str]
    standing_images: int


@task(name="plan-annotation", task_run_name="plan-annotation", cache_policy=NO_CACHE)
def plan_annotation(config: BootstrapConfig) -> AnnotationPlan:
    """Says which shards have no annotations of these models and settings yet."""
    plan = preview_annotation(config, workspace_of(config), shard_names(config))
    progress.say(
        f"annotate: {plan.images} images in {len(plan.names)} shards to annotate; {len(plan.standing_names)} shards "
        "stand"
    )
    return plan


def preview_annotation(config: BootstrapConfig, workspace: Workspace, names: Iterable[str]) -> AnnotationPlan:
    """The same for these shards of a workspace, outside of Prefect.

    A shard or part that is torn counts as one to annotate: the annotation then names it.
    """
    captioner, filter = model_digests(config)
    missing: dict[str, int] = {}
    standing: dict[str, int] = {}
    for name in names:
        job = _job(config, workspace, name)
        try:
            found = standing_part(job, captioner, filter, config.annotate, config.generation, config.seed)
            if found is not None:
                standing[name] = found.images
            else:
                missing[name] = count_images(job.shard)
        except CapfiltError:
            missing[name] = 0
    return AnnotationPlan(list(missing), sum(missing.values()), list(standing), sum(standing.values()))


@task(name="annotate-batch", task_run_name="annotate-{names[0]}", cache_policy=NO_CACHE)
def annotate_batch(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
    """Captions and scores some shards, on the accelerator where there is one; returns the failures by shard."""
    captioner, filter = load_models(config)
    workspace = workspace_of(config)
    failures: dict[str, CapfiltError] = {}
    for result in annotate_shards(
        [_job(config, workspace, name) for name in names],
        captioner,
        filter,
        config.annotate,
        config.generation,
        config.seed,
        lambda shard: progress.at("annotate", shard.shard, shard.done),
    ):
        if isinstance(result, FailedShard):
            failures[result.shard] = result.error
        else:
            _report(config, result)
    return failures


def _report(config: BootstrapConfig, summary: AnnotationSummary) -> None:
    progress.at("annotate", summary.shard, summary.images)
    if not summary.skipped:
        add_seconds(config, "annotate", summary.seconds)
        add_images(config, "annotate", summary.images)
        progress.say(f"shard {summary.shard}: {summary.images} images, {summary.candidates} candidates")


def _job(config: BootstrapConfig, workspace: Workspace, name: str) -> ShardJob:
    return ShardJob(workspace.shard(name), workspace.round(config.round).annotations / f"{name}.parquet")
