"""Where a configuration's work lies, and the account of the seconds that its steps took. Imports no Prefect."""

import threading
from functools import lru_cache
from pathlib import Path

from blip_core.config import BootstrapConfig
from blip_core.corpus.rounds import read_begun
from blip_core.data.download import preview_plan
from blip_core.data.tables import PairTable
from blip_core.errors import ConfigError
from blip_core.med.description import read_checkpoint_config
from blip_core.med.sources import locate
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


def shards_before(config: BootstrapConfig) -> list[str]:
    """The shards that stood when `re-bootstrap` began the round; none for a round that it did not begin."""
    begun = read_begun(round_of(config))
    return [] if begun is None else begun.shards


def shard_names(config: BootstrapConfig) -> list[str]:
    """The shards of a round; in a trial of some rows of the table, those that hold such rows.

    They are all that stand, or stood when `re-bootstrap` began the round after this one.
    """
    workspace = workspace_of(config)
    following = read_begun(workspace.round(config.round + 1))
    names = [path.stem for path in workspace.shard_paths()] if following is None else following.shards
    if config.web.limit is None:
        return names
    done = set(preview_plan(config.web, config.download, workspace, shards_before(config)).done)
    return [name for name in names if name in done]


def captioner_source(config: BootstrapConfig) -> str | Path:
    """The given Captioner, or else the round's own: a folder, a .pth file, or a name on the hub."""
    return config.checkpoints.captioner or round_of(config).captioner


def filter_source(config: BootstrapConfig) -> str | Path:
    """The given Filter, or else the round's own: a folder, a .pth file, or a name on the hub."""
    return config.checkpoints.filter or round_of(config).filter


def finetune_start(config: BootstrapConfig) -> Path:
    """The MED that the fine-tunings begin with: the round's own, or the one retrained on the round before it."""
    begun = read_begun(round_of(config))
    if begun is None or begun.promoted is None:
        return round_of(config).med
    return workspace_of(config).round(begun.promoted).retrained


def model_digests(config: BootstrapConfig) -> tuple[str, str]:
    """The digests of Captioner and Filter, with no model built. Raises CheckpointError as `load_med` does."""
    captioner, filter = (read_checkpoint_config(find(config)) for find in (captioner_source, filter_source))
    return captioner["digest"], filter["digest"]


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
