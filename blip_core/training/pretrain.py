"""Pre-training: ITC + ITM + LM, 1:1:1, from one pass through the image encoder (BLIP, section 3.2)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from blip_core.data.pairs import PairBatch, PairSource, iterate_texts, pairs_digest
from blip_core.files import fingerprint
from blip_core.med.itc import itc_loss
from blip_core.med.itm import draw_hard_negatives, itm_loss
from blip_core.med.lm import lm_loss
from blip_core.med.med import MED, TEMPERATURE_RANGE, Architecture, MEDConfig, build_med
from blip_core.med.momentum import EmbeddingQueue, MomentumEncoders
from blip_core.med.tokenizer import TokenBatch, Tokenizer, TokenizerConfig
from blip_core.training.recipe import TrainConfig
from blip_core.training.run import TrainSummary, gather, run_training
from blip_core.training.train import Progress


class ContrastiveMatching(nn.Module):
    """ITC and ITM over one batch: the Filter's objectives, and two of pre-training's three."""

    def __init__(self, med: MED, architecture: Architecture, tokenizer: Tokenizer, config: TrainConfig) -> None:
        super().__init__()
        self.med = med
        self.momentum = MomentumEncoders(med, architecture)
        self.queue = EmbeddingQueue(config.queue_size, architecture.projection)
        self.tokenizer = tokenizer
        self.config = config

    def forward(self, batch: PairBatch, step: int) -> dict[str, Tensor]:
        return self.losses(self.med.encode_image(batch.images), self.tokenize(batch), batch, step)

    def tokenize(self, batch: PairBatch) -> TokenBatch:
        tokens = self.tokenizer(batch.texts)
        return TokenBatch(tokens.ids.to(batch.images.device), tokens.mask.to(batch.images.device))

    def losses(self, features: Tensor, tokens: TokenBatch, batch: PairBatch, step: int) -> dict[str, Tensor]:
        """ITC and ITM of image features (B, N, D) and tokens (B, L)."""
        with torch.no_grad():
            self.med.temperature.clamp_(*TEMPERATURE_RANGE)
        image = self.med.project_image(features)
        text = self.med.embed_text(*tokens)
        return {
            "itc": self._itc(image, text, tokens, batch, step),
            "itm": self._itm(features, image @ text.T, tokens, batch.image_ids),
        }

    def _itc(self, image: Tensor, text: Tensor, tokens: TokenBatch, batch: PairBatch, step: int) -> Tensor:
        if self.training:
            self.momentum.follow(self.med, self.config.momentum)
        momentum_image, momentum_text = self.momentum(batch.images, *tokens)
        ids = batch.image_ids
        known = torch.cat([ids, self.queue.image_ids])
        loss = itc_loss(
            image,
            text,
            torch.cat([momentum_image, self.queue.images]),
            torch.cat([momentum_text, self.queue.texts]),
            momentum_image,
            momentum_text,
            ids[:, None] == known[None, :],
            self.med.temperature,
            ramped_alpha(step, self.config),
        )
        self.queue.push(gather(momentum_image), gather(momentum_text), gather(ids))
        return loss

    def _itm(self, features: Tensor, similarities: Tensor, tokens: TokenBatch, image_ids: Tensor) -> Tensor:
        negatives = draw_hard_negatives(similarities, image_ids, self.med.temperature)
        ids, mask = tokens
        logits = self.med.match(
            torch.cat([features, features[negatives.images], features]),
            torch.cat([ids, ids, ids[negatives.texts]]),
            torch.cat([mask, mask, mask[negatives.texts]]),
        )
        return itm_loss(logits, image_ids, negatives)


class Pretraining(ContrastiveMatching):
    """All three objectives over one batch."""

    def forward(self, batch: PairBatch, step: int) -> dict[str, Tensor]:
        features = self.med.encode_image(batch.images)
        tokens = self.tokenize(batch)
        losses = self.losses(features, tokens, batch, step)
        logits = self.med.decode(features, *tokens)
        return {**losses, "lm": lm_loss(logits, *tokens)}


def ramped_alpha(step: int, config: TrainConfig) -> float:
    """The soft targets' weight, rising from zero over `alpha_ramp_steps`."""
    return config.alpha * min(1.0, step / config.alpha_ramp_steps) if config.alpha_ramp_steps else config.alpha


def pretrain(
    target: Path,
    sources: Sequence[PairSource],
    med: MEDConfig,
    train: TrainConfig,
    tokenizer: TokenizerConfig,
    seed: int,
    metrics: Path,
    progress: Progress | None = None,
) -> TrainSummary:
    """Trains a MED from scratch and writes its checkpoint to `target`, unless it stands there already.

    Args:
        target: the checkpoint's folder; its name is the model's in the metrics file.
        sources: the pairs to train on.
        seed: decides weights, order, augmentation and negatives.
        metrics: the JSON-lines file of the training's curve.
    """
    architecture = med.architecture()
    data = pairs_digest(sources)
    origin = {
        "fingerprint": fingerprint("pretrain", data, asdict(architecture), asdict(train), asdict(tokenizer), seed),
        "data": data,
        "train": asdict(train),
        "seed": seed,
    }

    def build() -> tuple[Pretraining, Tokenizer]:
        words = (
            Tokenizer.train(iterate_texts(sources), tokenizer.vocabulary, tokenizer.max_tokens)
            if tokenizer.source == "train"
            else Tokenizer.load(tokenizer.source, tokenizer.max_tokens)
        )
        torch.manual_seed(seed)
        model = build_med(architecture, len(words), words.encode_id, words.decode_id)
        return Pretraining(model, architecture, words, train), words

    return run_training(target, build, architecture, sources, train, seed, origin, metrics, progress)
