"""Annotating shards, a batch of them in one task; the Captioner and the Filter are loaded once for a process."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.capfilt import annotate
from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from tasks import progress
from tasks.models import load_models
from tasks.workplace import add_seconds, round_of, workspace_of


@task(name="annotate-batch", task_run_name="annotate-{names[0]}", cache_policy=NO_CACHE)
def annotate_batch(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
    """Captions and scores some shards, on the accelerator where there is one; returns the failures by shard."""
    captioner, filter = load_models(config)
    failures: dict[str, CapfiltError] = {}
    for name in names:
        try:
            summary = annotate.annotate_shard(
                workspace_of(config).shard(name),
                round_of(config).annotations / f"{name}.parquet",
                captioner,
                filter,
                config.annotate,
                config.generation,
                config.seed,
            )
        except CapfiltError as error:
            failures[name] = error
            continue
        if not summary.skipped:
            add_seconds(config, "annotate", summary.seconds)
            progress.say(f"shard {name}: {summary.images} images, {summary.candidates} candidates")
        progress.at("annotate", name, summary.images)
    return failures
