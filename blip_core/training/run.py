"""What every training has around its loop: skip what stands, resume what was killed, write the checkpoint."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blip_core.data.pairs import PairSource
from blip_core.data.stream import PairStream
from blip_core.data.transforms import train_transform
from blip_core.med.architecture import Architecture
from blip_core.med.checkpoint import save_med
from blip_core.med.description import CONFIG, read_checkpoint_config
from blip_core.med.med import MED, build_med
from blip_core.training import parallel, processes
from blip_core.training.objectives import Objective
from blip_core.training.recipe import TrainConfig, check_recipe
from blip_core.training.state import TrainingState
from blip_core.training.train import Progress, train


class TrainSummary(NamedTuple):
    """What a training did."""

    steps: int
    seconds: float
    skipped: bool
    digest: str
    undecodable: int
    main: bool  # whether this process wrote the checkpoint


def run_training(
    target: Path,
    build: Callable[[], Objective],
    architecture: Architecture,
    sources: Sequence[PairSource],
    config: TrainConfig,
    seed: int,
    origin: dict[str, Any],
    seen: dict[str, Any],
    metrics: Path,
    progress: Progress | None,
) -> TrainSummary:
    """Trains what `build` makes and writes the checkpoint, unless one with the same fingerprint stands.

    `origin` goes into its config.json, and `seen`, the record of its data, into data.json beside that.
    All processes of a launch call this alike. A run under way keeps its state beside the target in
    `.<name>.training`, which goes when the checkpoint stands.
    """
    began = time.monotonic()
    check_recipe(target.name, config)
    if (target / CONFIG).is_file():
        standing = read_checkpoint_config(target)
        if standing.get("fingerprint") == origin["fingerprint"]:
            return TrainSummary(config.steps, 0.0, True, standing["digest"], 0, False)
    objective = build()
    transform = train_transform(architecture.image_size, config.crop_scale, config.flip, config.augment)
    state = TrainingState(target.parent / f".{target.name}.training", origin["fingerprint"])

    def stream(rank: int, world: int) -> PairStream:
        batch_size = config.batch_size // config.accumulation
        return PairStream(sources, batch_size, transform, seed, rank, world, config.lanes, config.workers)

    undecodable = train(target.name, objective, stream, config, seed, state, metrics, progress)
    med = _whole(objective, architecture)
    if processes.is_first():
        origin = {"steps": config.steps, "undecodable": undecodable, **origin}
        save_med(target, med, architecture, objective.tokenizer, origin, seen)
        state.remove()
    processes.wait()
    digest = read_checkpoint_config(target)["digest"]
    seconds = time.monotonic() - began
    return TrainSummary(config.steps, seconds, False, digest, undecodable, processes.is_first())


def _whole(objective: Objective, architecture: Architecture) -> MED:
    """The trained MED with all its weights, wherever they were in training; all processes take part.

    In other processes than the first it may still be in shares.
    """
    if processes.world() == 1:
        return objective.med
    weights = parallel.model_state(objective.med)
    if not weights:
        return objective.med
    tokenizer = objective.tokenizer
    med = build_med(architecture, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id, objective.med.faces)
    med.load_state_dict(weights)
    return med
