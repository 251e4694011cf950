"""Annotating some shards in one process, the models loaded once."""

from collections.abc import Iterator

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.capfilt.annotate import annotate_shards
from blip_core.capfilt.parts import AnnotationSummary, FailedShard, Progress
from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from tasks.annotate import job_of, show_shard, work_through
from tasks.models import load_models
from tasks.workplace import workspace_of


def annotate_names(
    config: BootstrapConfig, names: list[str], at: Progress | None = None
) -> Iterator[AnnotationSummary | FailedShard]:
    """Captions and scores some shards, on the accelerator where there is one; outside of Prefect.

    Raises CheckpointError as `load_models` does.
    """
    captioner, filter = load_models(config)
    workspace = workspace_of(config)
    jobs = [job_of(config, workspace, name) for name in names]
    yield from annotate_shards(jobs, captioner, filter, config.annotate, config.generation, config.seed, at)


@task(name="annotate-batch", task_run_name="annotate-{names[0]}", cache_policy=NO_CACHE)
def annotate_batch(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
    """Captions and scores some shards in this process, and keeps the account; returns the failures by shard."""
    return work_through(config, annotate_names(config, names, show_shard))
