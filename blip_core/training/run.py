"""What every training has around its loop: skip what stands, resume what was killed, write the checkpoint."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip_core.data.pairs import PairSource, PairStream
from blip_core.data.transforms import train_transform
from blip_core.med.checkpoint import CONFIG, read_checkpoint_config, save_med
from blip_core.med.med import Architecture
from blip_core.med.tokenizer import Tokenizer
from blip_core.training.recipe import TrainConfig
from blip_core.training.state import TrainingState
from blip_core.training.train import Progress, train


class TrainSummary(NamedTuple):
    """What a training did."""

    steps: int
    seconds: float
    skipped: bool
    digest: str


def run_training(
    target: Path,
    build: Callable[[], tuple[Any, Tokenizer]],
    architecture: Architecture,
    sources: Sequence[PairSource],
    config: TrainConfig,
    seed: int,
    origin: dict[str, Any],
    metrics: Path,
    progress: Progress | None,
) -> TrainSummary:
    """Trains what `build` makes and writes the checkpoint, unless one with the same fingerprint stands.

    A run under way keeps its state beside the target in `.<name>.training`, which goes when the checkpoint stands.
    """
    began = time.monotonic()
    if (target / CONFIG).is_file():
        standing = read_checkpoint_config(target)
        if standing.get("fingerprint") == origin["fingerprint"]:
            return TrainSummary(config.steps, 0.0, True, standing["digest"])
    module, tokenizer = build()
    size = architecture.image_size
    transform = train_transform(size, config.crop_scale, config.flip)
    state = TrainingState(target.parent / f".{target.name}.training", origin["fingerprint"])

    def stream(rank: int, world: int) -> PairStream:
        return PairStream(sources, config.batch_size, transform, seed, rank, world)

    train(target.name, module, stream, config, seed, state, metrics, progress)
    digest = save_med(target, module.med, architecture, tokenizer, {"steps": config.steps, **origin})
    shutil.rmtree(state.folder, ignore_errors=True)
    return TrainSummary(config.steps, time.monotonic() - began, False, digest)


@torch.no_grad()
def gather(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, (world * B, ...); of one process alone where there is no group."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
