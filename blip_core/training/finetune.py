"""Fine-tuning on human pairs: the Captioner with LM, the Filter with ITC and ITM (BLIP, section 3.3).

Both start from the same pre-trained MED, and share nothing after that.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from blip_core.data.pairs import PairBatch, PairSource, pairs_digest
from blip_core.files import fingerprint
from blip_core.med.checkpoint import LoadedMED, load_med, read_checkpoint_config
from blip_core.med.lm import lm_loss
from blip_core.med.med import MED, architecture_from
from blip_core.med.tokenizer import Tokenizer
from blip_core.training.pretrain import ContrastiveMatching
from blip_core.training.recipe import TrainConfig
from blip_core.training.run import TrainSummary, run_training
from blip_core.training.train import Progress


class Captioning(nn.Module):
    """LM over one batch."""

    def __init__(self, med: MED, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.med = med
        self.tokenizer = tokenizer

    def forward(self, batch: PairBatch, step: int) -> dict[str, Tensor]:
        ids, mask = (part.to(batch.images.device) for part in self.tokenizer(batch.texts))
        return {"lm": lm_loss(self.med.decode(self.med.encode_image(batch.images), ids, mask), ids, mask)}


def finetune_captioner(
    target: Path,
    start: Path,
    sources: Sequence[PairSource],
    train: TrainConfig,
    seed: int,
    metrics: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Fine-tunes the MED at `start` into a Captioner at `target`, unless it stands there already."""

    def captioning(loaded: LoadedMED) -> nn.Module:
        return Captioning(loaded.med, loaded.tokenizer)

    return _finetune("captioner", captioning, target, start, sources, train, seed, metrics, progress)


def finetune_filter(
    target: Path,
    start: Path,
    sources: Sequence[PairSource],
    train: TrainConfig,
    seed: int,
    metrics: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Fine-tunes the MED at `start` into a Filter at `target`, unless it stands there already."""

    def matching(loaded: LoadedMED) -> nn.Module:
        torch.manual_seed(seed)
        return ContrastiveMatching(loaded.med, loaded.architecture, loaded.tokenizer, train)

    return _finetune("filter", matching, target, start, sources, train, seed, metrics, progress)


def _finetune(
    kind: str,
    wrap: Callable[[LoadedMED], nn.Module],
    target: Path,
    start: Path,
    sources: Sequence[PairSource],
    train: TrainConfig,
    seed: int,
    metrics: Path,
    progress: Progress | None,
) -> TrainSummary:
    started = read_checkpoint_config(start)
    data = pairs_digest(sources)
    origin = {
        "fingerprint": fingerprint(kind, data, started["digest"], asdict(train), seed),
        "start": started["digest"],
        "data": data,
        "train": asdict(train),
        "seed": seed,
    }

    def build() -> tuple[nn.Module, Tokenizer]:
        loaded = load_med(start)
        return wrap(loaded), loaded.tokenizer

    architecture = architecture_from(started["med"])
    return run_training(target, build, architecture, sources, train, seed, origin, metrics, progress)
