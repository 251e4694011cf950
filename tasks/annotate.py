"""Annotating shards, a batch of them in one task; the Captioner and the Filter are loaded once for a process."""

import threading
from functools import lru_cache
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.capfilt import annotate
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from blip_core.med.checkpoint import read_checkpoint_config
from tasks import progress
from tasks.workplace import add_seconds, captioner_source, filter_source, round_of, workspace_of

_loading = threading.Lock()


@task(name="annotate-batch", task_run_name="annotate-{names[0]}", cache_policy=NO_CACHE)
def annotate_batch(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
    """Captions and scores some shards, on the accelerator where there is one; returns the failures by shard."""
    captioner, filter = _models(captioner_source(config), filter_source(config))
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


def _models(captioner: str | Path, filter: str | Path) -> tuple[Captioner, Filter]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _loading:
        return (
            _captioner(captioner, read_checkpoint_config(captioner)["digest"], device),
            _filter(filter, read_checkpoint_config(filter)["digest"], device),
        )


# The digest is part of the key: a checkpoint that changed on disk is loaded anew.
@lru_cache(maxsize=1)
def _captioner(source: str | Path, digest: str, device: str) -> Captioner:
    return Captioner.load(source, device)


@lru_cache(maxsize=1)
def _filter(source: str | Path, digest: str, device: str) -> Filter:
    return Filter.load(source, device)
