"""Annotating one shard after another; the Captioner and the Filter are loaded once for a process."""

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
from blip_core.med.checkpoint import read_checkpoint_config
from tasks import progress
from tasks.workplace import add_seconds, captioner_folder, filter_folder, round_of, workspace_of

_loading = threading.Lock()


@task(name="annotate-shard", task_run_name="annotate-{name}", cache_policy=NO_CACHE)
def annotate_shard(config: BootstrapConfig, name: str) -> annotate.AnnotationSummary:
    """Captions and scores one shard, on the accelerator where there is one."""
    captioner, filter = _models(captioner_folder(config), filter_folder(config))
    summary = annotate.annotate_shard(
        workspace_of(config).shard(name),
        round_of(config).annotations / f"{name}.parquet",
        captioner,
        filter,
        config.annotate,
        config.generation,
        config.seed,
    )
    if not summary.skipped:
        add_seconds(config, "annotate", summary.seconds)
        progress.say(f"shard {name}: {summary.images} images, {summary.candidates} candidates")
    return summary


def _models(captioner: Path, filter: Path) -> tuple[Captioner, Filter]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _loading:
        return (
            _captioner(captioner, read_checkpoint_config(captioner)["digest"], device),
            _filter(filter, read_checkpoint_config(filter)["digest"], device),
        )


# The digest is part of the key: a checkpoint that changed on disk is loaded anew.
@lru_cache(maxsize=1)
def _captioner(folder: Path, digest: str, device: str) -> Captioner:
    return Captioner.load(folder, device)


@lru_cache(maxsize=1)
def _filter(folder: Path, digest: str, device: str) -> Filter:
    return Filter.load(folder, device)
