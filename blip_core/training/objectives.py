"""What is trained: MED with the objectives that turn a batch of pairs into losses.

`Pretraining` has all three (BLIP, section 3.2), from one pass through the image encoder and one grounding of the
images; `ContrastiveMatching` is the Filter's ITC + ITM, `Captioning` the Captioner's LM (section 3.3).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from blip_core.data.stream import PairBatch
from blip_core.med.architecture import Architecture
from blip_core.med.itc import cosines, itc_loss
from blip_core.med.itm import HardNegatives, draw_hard_negatives, itm_loss
from blip_core.med.lm import lm_loss
from blip_core.med.med import MED, TEMPERATURE_RANGE
from blip_core.med.momentum import EmbeddingQueue, MomentumEncoders
from blip_core.med.text_transformer import CrossKeys
from blip_core.med.tokenizer import Tokenizer
from blip_core.training import processes
from blip_core.training.recipe import TrainConfig


class Batch(NamedTuple):
    """B tokenized pairs of one process."""

    images: Tensor  # (B, 3, S, S)
    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) bool
    image_ids: Tensor  # (B,) int64, equal where the image is


class Step(NamedTuple):
    """Where a training is."""

    number: int
    seed: int  # of the step's draws, the same in all processes
    tokens: Tensor  # (), tokens that LM predicts, the mean over the step's processes and micro-batches


class Objective(nn.Module):
    """MED and its tokenizer; those who inherit give losses by name for (batch, step)."""

    def __init__(self, med: MED, tokenizer: Tokenizer, config: TrainConfig, prompt: str = "") -> None:
        super().__init__()
        self.med = med
        self.tokenizer = tokenizer
        self.config = config
        self.prompt = prompt
        # [DEC] stands in the place of [CLS]; without a prompt it is the only token that is given
        self.prompt_length = len(tokenizer.pieces(prompt)["input_ids"]) - 1 if prompt else 0

    def tokenize(self, pairs: PairBatch, device: torch.device) -> Batch:
        """The batch with token ids, on `device`."""
        ids, mask = self.tokenizer(pairs.texts, self.config.max_tokens, self.config.compile, self.prompt)
        return Batch(*(part.to(device, non_blocking=True) for part in (pairs.images, ids, mask, pairs.image_ids)))

    def compile_layers(self) -> None:
        """Compiles the transformers' layers in place."""
        self.med.compile_layers()

    def begin_step(self) -> None:
        """What happens once before the losses of a step, whatever the number of its micro-batches."""


class Captioning(Objective):
    """LM: the Captioner's objective."""

    def __init__(self, med: MED, tokenizer: Tokenizer, config: TrainConfig) -> None:
        super().__init__(med, tokenizer, config, config.prompt)

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        image = self.med.cross_keys(self.med.encode_image(batch.images))
        logits = self.med.decode(image, batch.ids, batch.mask)
        return {"lm": lm_loss(logits, batch.ids, batch.mask, self.prompt_length, step.tokens)}


class Keys(NamedTuple):
    """Momentum embeddings (G, E) and image ids (G,) of the batch's pairs in all processes."""

    images: Tensor
    texts: Tensor
    image_ids: Tensor


class ContrastiveMatching(Objective):
    """ITC and ITM: the Filter's objectives, and two of pre-training's three."""

    def __init__(self, med: MED, architecture: Architecture, tokenizer: Tokenizer, config: TrainConfig) -> None:
        super().__init__(med, tokenizer, config)
        self.momentum = MomentumEncoders(med, architecture)
        self.queue = EmbeddingQueue(config.queue_size, architecture.projection)

    def compile_layers(self) -> None:
        super().compile_layers()
        self.momentum.compile_layers()

    def begin_step(self) -> None:
        with torch.no_grad():
            self.med.temperature.clamp_(*TEMPERATURE_RANGE)
        self.momentum.follow(self.med, self.config.momentum)

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self.contrast_and_match(self.med.encode_image(batch.images), batch, step)[0]

    def contrast_and_match(self, features: Tensor, batch: Batch, step: Step) -> tuple[dict[str, Tensor], CrossKeys]:
        """ITC and ITM of image features (B, N, D), and the images' cross-attention keys, its own B rows first."""
        image, text = self.med.project_image(features), self.med.embed_text(batch.ids, batch.mask)
        embedded = self.momentum(batch.images, batch.ids, batch.mask)
        keys = Keys(*(processes.gather(rows) for rows in (*embedded, batch.image_ids)))
        itc = self._itc(image, text, embedded, keys, batch.image_ids, step)
        self.queue.push(*keys)
        negatives = self._negatives(image, text, keys, batch.image_ids, step)
        itm, cross_keys = self._itm(features, negatives, batch)
        return {"itc": itc, "itm": itm}, cross_keys

    def _itc(
        self, image: Tensor, text: Tensor, embedded: tuple[Tensor, Tensor], keys: Keys, ids: Tensor, step: Step
    ) -> Tensor:
        known = torch.cat([keys.image_ids, self.queue.image_ids])
        return itc_loss(
            image,
            text,
            torch.cat([keys.images, self.queue.images]),
            torch.cat([keys.texts, self.queue.texts]),
            *embedded,
            ids[:, None] == known[None, :],
            self.med.temperature,
            ramped_alpha(step.number, self.config),
        )

    def _negatives(self, image: Tensor, text: Tensor, keys: Keys, ids: Tensor, step: Step) -> HardNegatives:
        others = self._mined(image, text, keys)
        if self.config.negatives == "process":
            others = Keys(*(processes.own_rows(rows) for rows in others))
        generator = torch.Generator().manual_seed(step.seed)
        uniforms = torch.rand(2, len(keys.image_ids), generator=generator)
        return draw_hard_negatives(
            cosines(image, others.texts),
            cosines(text, others.images),
            ids[:, None] == others.image_ids[None, :],
            self.med.temperature,
            processes.own_rows(uniforms.T).T.to(image.device),
        )

    def _mined(self, image: Tensor, text: Tensor, keys: Keys) -> Keys:
        """The embeddings whose similarity makes a negative hard: in retrieval fine-tuning, the model's own."""
        return Keys(processes.gather(image), processes.gather(text), keys.image_ids)

    def _itm(self, features: Tensor, negatives: HardNegatives, batch: Batch) -> tuple[Tensor, CrossKeys]:
        ids, mask = batch.ids, batch.mask
        own = torch.arange(len(ids), device=ids.device)
        if processes.world() == 1 or self.config.negatives == "process":
            image, rows = self.med.cross_keys(features), torch.cat([own, negatives.images, own])
            other_ids, other_mask = ids, mask
        else:
            drawn = processes.gather_with_gradient(features)[negatives.images]
            image, rows = self.med.cross_keys(torch.cat([features, drawn])), torch.cat([own, own + len(own), own])
            other_ids, other_mask = processes.gather_ragged(ids), processes.gather_ragged(mask)
            ids, mask = (_widened(part, other_ids.shape[1]) for part in (ids, mask))
        logits = self.med.match(
            image.select(rows),
            torch.cat([ids, ids, other_ids[negatives.texts]]),
            torch.cat([mask, mask, other_mask[negatives.texts]]),
        )
        counted = len(own) + 2.0 * negatives.found.sum()
        return itm_loss(logits, negatives.found, processes.mean(counted)), image


class Pretraining(ContrastiveMatching):
    """All three objectives, 1:1:1."""

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        losses, image = self.contrast_and_match(self.med.encode_image(batch.images), batch, step)
        own = image.select(slice(len(batch.ids)))
        logits = self.med.decode(own, batch.ids, batch.mask)
        return {**losses, "lm": lm_loss(logits, batch.ids, batch.mask, self.prompt_length, step.tokens)}

    def _mined(self, image: Tensor, text: Tensor, keys: Keys) -> Keys:
        """In pre-training the momentum encoders' embeddings make a negative hard, as in the official code."""
        return keys


def ramped_alpha(step: int, config: TrainConfig) -> float:
    """The soft targets' weight, rising from zero over `alpha_ramp_steps`."""
    return config.alpha * min(1.0, step / config.alpha_ramp_steps) if config.alpha_ramp_steps else config.alpha


def _widened(rows: Tensor, length: int) -> Tensor:
    return nn.functional.pad(rows, (0, length - rows.shape[1]))
