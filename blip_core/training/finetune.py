"""Fine-tuning on human pairs: the Captioner with LM, the Filter with ITC and ITM (BLIP, section 3.3).

Both start from the same pre-trained MED, and share nothing after that. The face that a fine-tuning does not use
stays as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from blip_core.data.pairs import PairSource
from blip_core.data.seen import see
from blip_core.files import fingerprint
from blip_core.med.architecture import Face, architecture_from
from blip_core.med.checkpoint import LoadedMED, load_med
from blip_core.med.description import read_checkpoint_config
from blip_core.med.med import MED
from blip_core.training.objectives import Captioning, ContrastiveMatching, Objective
from blip_core.training.recipe import TrainConfig, identity
from blip_core.training.run import TrainSummary, run_training
from blip_core.training.train import Progress

IDLE_IN_CAPTIONING = ("encoder.", "image_projection.", "text_projection.", "itm_head.", "temperature")
IDLE_IN_MATCHING = ("decoder.", "head_")


def finetune_captioner(
    target: Path,
    start: Path,
    sources: Sequence[PairSource],
    train: TrainConfig,
    seed: int,
    metrics: Path,
    progress: Progress | None = None,
    round: int | None = None,
) -> TrainSummary:
    """Fine-tunes the MED at `start` into a Captioner at `target`, unless it stands there already."""

    def captioning(loaded: LoadedMED) -> Objective:
        _freeze(loaded.med, IDLE_IN_CAPTIONING)
        return Captioning(loaded.med, loaded.tokenizer, train)

    return _finetune("captioner", "decoder", captioning, target, start, sources, train, seed, metrics, progress, round)


def finetune_filter(
    target: Path,
    start: Path,
    sources: Sequence[PairSource],
    train: TrainConfig,
    seed: int,
    metrics: Path,
    progress: Progress | None = None,
    round: int | None = None,
) -> TrainSummary:
    """Fine-tunes the MED at `start` into a Filter at `target`, unless it stands there already."""

    def matching(loaded: LoadedMED) -> Objective:
        _freeze(loaded.med, IDLE_IN_MATCHING)
        torch.manual_seed(seed)
        return ContrastiveMatching(loaded.med, loaded.architecture, loaded.tokenizer, train)

    return _finetune("filter", "encoder", matching, target, start, sources, train, seed, metrics, progress, round)


def _finetune(
    kind: str,
    face: Face,
    wrap: Callable[[LoadedMED], Objective],
    target: Path,
    start: Path,
    sources: Sequence[PairSource],
    train: TrainConfig,
    seed: int,
    metrics: Path,
    progress: Progress | None,
    round: int | None,
) -> TrainSummary:
    started = read_checkpoint_config(start)
    data, seen = see(sources, round)
    origin = {
        "fingerprint": fingerprint(kind, data, started["digest"], identity(train), seed),
        "start": started["digest"],
        "data": data,
        "train": asdict(train),
        "seed": seed,
    }
    architecture = architecture_from(started["med"])
    architecture = replace(architecture, image_size=train.image_size or architecture.image_size)

    def build() -> Objective:
        return wrap(load_med(start, image_size=train.image_size, face=face))

    return run_training(target, build, architecture, sources, train, seed, origin, seen, metrics, progress)


def _freeze(med: MED, idle: tuple[str, ...]) -> None:
    """Leaves the parameters that the objectives do not reach out of the training."""
    for name, parameter in med.named_parameters():
        own = name.removeprefix("text.").partition("self_attention.")[2] or name.removeprefix("text.")
        if own.startswith(idle):
            parameter.requires_grad = False
