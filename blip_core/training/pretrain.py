"""Pre-training: ITC + ITM + LM on web and human pairs, from pre-trained encoders or from random (BLIP, section 3.2)."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from blip_core.data.pairs import PairSource, iterate_texts
from blip_core.data.seen import see
from blip_core.files import fingerprint
from blip_core.med.architecture import MEDConfig
from blip_core.med.initialise import initialise
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.training.objectives import Pretraining
from blip_core.training.recipe import TrainConfig, identity
from blip_core.training.run import TrainSummary, run_training
from blip_core.training.train import Progress


def pretrain(
    target: Path,
    sources: Sequence[PairSource],
    med: MEDConfig,
    train: TrainConfig,
    tokenizer: TokenizerConfig,
    seed: int,
    metrics: Path,
    progress: Progress | None = None,
    round: int | None = None,
) -> TrainSummary:
    """Trains a MED and writes its checkpoint to `target`, unless it stands there already.

    Args:
        target: the checkpoint's folder; its name is the model's in the metrics file.
        sources: the pairs to train on.
        seed: decides weights, order, augmentation and negatives.
        metrics: the JSON-lines file of the training's curve.
        round: of the workspace, for the record of what was seen.
    """
    architecture = (replace(med, image_size=train.image_size) if train.image_size else med).architecture()
    data, seen = see(sources, round)
    start = (med.image_weights, med.text_weights)
    settings = (asdict(architecture), start, identity(train), asdict(tokenizer), seed)
    origin = {
        "fingerprint": fingerprint("pretrain", data, *settings),
        "start": start,
        "data": data,
        "train": asdict(train),
        "seed": seed,
    }

    def build() -> Pretraining:
        words = (
            Tokenizer.train(iterate_texts(sources), tokenizer.vocabulary, tokenizer.max_tokens)
            if tokenizer.source == "train"
            else Tokenizer.load(tokenizer.source, tokenizer.max_tokens)
        )
        torch.manual_seed(seed)
        model = build_med(architecture, len(words), words.encode_id, words.decode_id)
        initialise(model, med)
        return Pretraining(model, architecture, words, train)

    return run_training(target, build, architecture, sources, train, seed, origin, seen, metrics, progress)
