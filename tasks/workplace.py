"""Where a configuration's work lies, and the account of the seconds that its steps took. Imports no Prefect."""

import threading
from functools import lru_cache
from pathlib import Path

from blip_core.config import BootstrapConfig
from blip_core.data.download import preview_plan
from blip_core.data.tables import PairTable
from blip_core.errors import ConfigError
from blip_core.med.foreign import locate
from blip_core.workspace import Round, Workspace

_account = threading.Lock()


def workspace_of(config: BootstrapConfig) -> Workspace:
    """The workspace, made if it is missing."""
    return _opened(config.workspace)


# Once for a process: whether it can be written need not be tried for every shard.
@lru_cache(maxsize=1)
def _opened(root: str) -> Workspace:
    return Workspace.open(root)


def round_of(config: BootstrapConfig) -> Round:
    """The round that the configuration works on."""
    return workspace_of(config).round(config.round)


def human_pairs(config: BootstrapConfig) -> PairTable:
    """The human pairs. Raises ConfigError where none are configured."""
    if config.human is None:
        raise ConfigError("human: missing; training needs human pairs, a Parquet table with images and captions")
    return config.human


def shard_names(config: BootstrapConfig) -> list[str]:
    """The shards of the workspace; in a trial of some rows of the table, those that hold such rows."""
    if config.web.limit is None:
        return [path.stem for path in workspace_of(config).shard_paths()]
    return preview_plan(config.web, config.download, workspace_of(config)).done


def captioner_source(config: BootstrapConfig) -> str | Path:
    """The given Captioner, or else the round's own: a folder, a .pth file, or a name on the hub."""
    return config.checkpoints.captioner or round_of(config).captioner


def filter_source(config: BootstrapConfig) -> str | Path:
    """The given Filter, or else the round's own: a folder, a .pth file, or a name on the hub."""
    return config.checkpoints.filter or round_of(config).filter


def tokenizer_source(config: BootstrapConfig, source: str | Path) -> str | None:
    """The tokenizer of a checkpoint that brings none, a .pth file; None for a folder, or where none is named."""
    return config.checkpoints.tokenizer if locate(source).is_file() else None


def add_seconds(config: BootstrapConfig, step: str, seconds: float) -> None:
    """Adds to a step's account; safe from the threads in which shards are worked on."""
    with _account:
        round_of(config).add_seconds(step, seconds)


def add_images(config: BootstrapConfig, step: str, images: int) -> None:
    """Adds to a step's count of images, next to the seconds that they took."""
    with _account:
        round_of(config).add_images(step, images)
