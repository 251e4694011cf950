"""Annotating: the shards whose parts are missing, and the account of those that are made. Needs no model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.capfilt.earlier import take_over_parts
from blip_core.capfilt.parts import (
    AnnotationSummary,
    FailedShard,
    Progress,
    ShardJob,
    ShardProgress,
    count_images,
    standing_part,
)
from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from blip_core.stores import each
from blip_core.workspace import Workspace
from tasks import progress
from tasks.workplace import add_images, add_seconds, model_digests, shard_names, workspace_of

# Annotates the named shards, of which none need stand, and says how far it is after every batch of images.
Annotator = Callable[[BootstrapConfig, list[str], Progress | None], Iterator[AnnotationSummary | FailedShard]]


@dataclass(frozen=True)
class AnnotationPlan:
    """What there is to annotate, and what stands already: the images of each shard, by its name."""

    missing: dict[str, int]
    standing: dict[str, int]

    @property
    def names(self) -> list[str]:
        """The shards to annotate."""
        return list(self.missing)

    @property
    def images(self) -> int:
        """Those to annotate."""
        return sum(self.missing.values())

    @property
    def standing_images(self) -> int:
        """Those that are annotated already."""
        return sum(self.standing.values())


@task(name="plan-annotation", task_run_name="plan-annotation", cache_policy=NO_CACHE)
def plan_annotation(config: BootstrapConfig) -> AnnotationPlan:
    """Says which shards have no annotations of these models and settings yet, in this round or an earlier one."""
    taken = take_over_annotations(config)
    plan = preview_annotation(config, workspace_of(config), shard_names(config))
    over = f", {taken} of them taken over from earlier rounds" if taken else ""
    progress.say(
        f"annotate: {plan.images} images in {len(plan.missing)} shards to annotate; {len(plan.standing)} shards "
        f"stand{over}"
    )
    return plan


def take_over_annotations(config: BootstrapConfig) -> int:
    """Takes over the parts that earlier rounds have of the same models and settings; returns how many."""
    workspace = workspace_of(config)
    earlier = [number for number in reversed(workspace.round_numbers()) if number < config.round]
    if not earlier:
        return 0
    return take_over_parts(
        [workspace.shard(name) for name in shard_names(config)],
        workspace.round(config.round),
        [workspace.round(number) for number in earlier],
        *model_digests(config),
        config.annotate,
        config.generation,
        config.seed,
    )


def preview_annotation(config: BootstrapConfig, workspace: Workspace, names: Iterable[str]) -> AnnotationPlan:
    """The same for these shards of a workspace, outside of Prefect.

    A shard or part that is torn counts as one to annotate: the annotation then names it.
    """
    captioner, filter = model_digests(config)
    plan = AnnotationPlan({}, {})

    def look(shard: Path) -> tuple[dict[str, int], int]:
        job = job_of(config, workspace, shard.stem)
        try:
            found = standing_part(job, captioner, filter, config.annotate, config.generation, config.seed)
            return (plan.missing, count_images(shard)) if found is None else (plan.standing, found.images)
        except CapfiltError:
            return plan.missing, 0

    names = list(names)
    looked = each((workspace.shard(name) for name in names), look)
    for name, (kind, images) in zip(names, looked, strict=True):
        kind[name] = images
    return plan


def work_through(
    config: BootstrapConfig, results: Iterable[AnnotationSummary | FailedShard], account: bool = True
) -> dict[str, CapfiltError]:
    """Reports each shard as it is done, and returns the failures.

    Args:
        account: whether to add to the round's seconds and images. Of the processes that work at a time, only one may.
    """
    failures: dict[str, CapfiltError] = {}
    for result in results:
        if isinstance(result, FailedShard):
            failures[result.shard] = result.error
            continue
        progress.at("annotate", result.shard, result.images)
        if not result.skipped:
            progress.say(f"shard {result.shard}: {result.images} images, {result.candidates} candidates")
            if account:
                add_work(config, result.seconds, result.images)
    return failures


def show_shard(shard: ShardProgress) -> None:
    """Shows how far a shard is."""
    progress.at("annotate", shard.shard, shard.done)


def add_work(config: BootstrapConfig, seconds: float, images: int) -> None:
    """Adds to the round's account of annotation."""
    add_seconds(config, "annotate", seconds)
    add_images(config, "annotate", images)


def job_of(config: BootstrapConfig, workspace: Workspace, name: str) -> ShardJob:
    """A shard, and the places of its parts in the round."""
    return ShardJob.of(workspace.round(config.round), workspace.shard(name))
