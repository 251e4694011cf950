"""The speed of one pre-training step: ours against the same step on transformers' BLIP modules, `make speed`.

Both take the same pairs through forward, three losses, backward and AdamW, with momentum encoders and queue, in one
process, by turns; first both are shown to compute the same losses from the same weights. `ratio` compares with a
forward pass of its own for each loss, `ratio_image_once` with passes that share one encoding of the images. Our
step's floating-point operations over its time are also held against the machine's measured matrix-multiply peak.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from machine import every_word, machine, matmul_rate, now
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers_step import TransformersPretraining

from blip_core.data.stream import PairBatch
from blip_core.med.architecture import PRESETS, Architecture
from blip_core.med.lm import predicted
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer
from blip_core.training.objectives import Batch, Pretraining, Step
from blip_core.training.recipe import TrainConfig

SEED = 0
VOCABULARY = 30522  # BERT's
QUEUE = 57600
# COCO's captions have 10.5 words on average; with [CLS] and [SEP] a batch is padded to its longest
WORDS = (8, 9, 10, 10, 11, 12, 13, 15)
LEARNING_RATE = 1e-5
WARM_UPS = 2
TOLERANCE = 1e-3


class Side(NamedTuple):
    """A step to measure: how its losses are computed, and its optimiser."""

    losses: Callable[[], dict[str, Tensor]]
    optimizer: torch.optim.Optimizer


class Timing(NamedTuple):
    """Seconds of one step: until the gradients are there, and of the optimiser."""

    gradients: float
    update: float

    @property
    def total(self) -> float:
        return self.gradients + self.update


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 where the two steps do not compute the same."""
    options = _options(arguments)
    architecture = replace(PRESETS[options.preset], image_size=options.image_size)
    figures = _benchmark(architecture, options)
    sys.stdout.write(json.dumps(figures) + "\n" if options.json else _table(figures))
    apart = {name: value for name, value in figures["differences"].items() if not value < TOLERANCE}
    if apart:
        sys.stderr.write(f"failed: the two steps do not compute the same losses: {apart}\n")
    return 1 if apart else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="base", help="the model's sizes")
    parser.add_argument("--image-size", type=int, help="side of the images; default: the preset's")
    parser.add_argument("--batch", type=int, help="pairs a step; default: 8, on a GPU 64")
    parser.add_argument("--repeats", type=int, default=7, help="measured steps of each side; the median counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="on cuda: bf16, ours compiled")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    options.batch = options.batch or (64 if options.device == "cuda" else 8)
    options.image_size = options.image_size or PRESETS[options.preset].image_size
    return options


def _benchmark(architecture: Architecture, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(SEED)
    device, fast = torch.device(options.device), options.device == "cuda"
    tokenizer = Tokenizer.train(every_word(), VOCABULARY, max_tokens=30)
    config = TrainConfig(
        batch_size=options.batch,
        # the official queue takes whole batches only
        queue_size=QUEUE - QUEUE % options.batch,
        precision="bf16" if fast else "fp32",
        compile=fast,
    )
    objective = _ours(architecture, tokenizer, config).to(device)
    pairs = _pairs(options.batch, architecture.image_size)
    theirs = _theirs(objective, architecture).to(device)
    differences = _differences(objective, theirs, pairs)
    batch = objective.tokenize(pairs, device)
    flops = _flops(objective, batch, config)
    if config.compile:
        objective.compile_layers()
    sides = {"ours": _our_side(objective, batch, config), **_their_sides(theirs, batch, config)}
    seconds, peak = _measure(sides, options.repeats, device, config)
    return {
        **_figures(seconds, flops, peak, options.batch),
        "differences": differences,
        "preset": options.preset,
        "batch": options.batch,
        "image_size": architecture.image_size,
        "tokens": batch.ids.shape[1],
        "dropout": architecture.dropout,
        "precision": config.precision,
        "compile": config.compile,
        "repeats": options.repeats,
        **machine(device),
    }


def _figures(seconds: dict[str, list[Timing]], flops: int, peak: float, batch: int) -> dict[str, Any]:
    totals = {side: statistics.median(timing.total for timing in timings) for side, timings in seconds.items()}
    updates = {side: statistics.median(timing.update for timing in timings) for side, timings in seconds.items()}
    return {
        "ratio": round(totals["transformers"] / totals["ours"], 3),
        "ratio_image_once": round(totals["transformers_image_once"] / totals["ours"], 3),
        "matmul_share": round(flops / (totals["ours"] * peak), 3),
        "seconds": {side: round(total, 4) for side, total in totals.items()},
        "optimizer_seconds": {side: round(update, 4) for side, update in updates.items()},
        "images_per_second": {side: round(batch / total, 2) for side, total in totals.items()},
        "step_tflop": round(flops / 1e12, 4),
        "matmul_peak_tflops": round(peak / 1e12, 4),
    }


def _pairs(batch: int, image_size: int) -> PairBatch:
    words = " ".join(every_word()).split()
    lengths = [WORDS[row % len(WORDS)] for row in range(batch)]
    places = torch.randint(VOCABULARY - 100, (batch, max(lengths))).tolist()
    texts = [" ".join(words[place] for place in row[:length]) for row, length in zip(places, lengths, strict=True)]
    return PairBatch(torch.randn(batch, 3, image_size, image_size), texts, torch.arange(batch))


def _ours(architecture: Architecture, tokenizer: Tokenizer, config: TrainConfig) -> Pretraining:
    med = build_med(architecture, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id)
    return Pretraining(med, architecture, tokenizer, config)


def _theirs(objective: Pretraining, architecture: Architecture) -> TransformersPretraining:
    config = objective.config
    return TransformersPretraining(
        objective.med, architecture, config.queue_size, config.momentum, config.alpha, objective.tokenizer.end_id
    )


def _differences(objective: Pretraining, theirs: TransformersPretraining, pairs: PairBatch) -> dict[str, float]:
    """How far the losses are apart at most: same weights, queue and pairs, in float32, without dropout.

    Of two pairs each one's only possible negative is the other, so that chance decides nothing.
    """
    objective.eval()
    theirs.eval()
    two = PairBatch(pairs.images[:2], pairs.texts[:2], pairs.image_ids[:2])
    batch = objective.tokenize(two, objective.queue.images.device)
    queue = objective.queue.images.T.clone(), objective.queue.texts.T.clone()
    found = []
    with torch.no_grad():
        objective.begin_step()
        own = objective(batch, _step(objective, batch))
        for image_once in (False, True):
            theirs.image_queue.copy_(queue[0])
            theirs.text_queue.copy_(queue[1])
            found.append(theirs(batch.images, batch.ids, batch.mask.long(), image_once))
    return {name: max(abs(loss.item() - other[name].item()) for other in found) for name, loss in own.items()}


def _step(objective: Pretraining, batch: Batch) -> Step:
    return Step(0, SEED, predicted(batch.mask, objective.prompt_length).sum().float())


def _flops(objective: Pretraining, batch: Batch, config: TrainConfig) -> int:
    """Floating-point operations of our step's matrix products, forward and backward, attention's among them."""
    # fused attention kernels are not counted on every device, the products that they stand for are
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with _mixed(batch, config):
            losses = objective(batch, _step(objective, batch))
        torch.stack(list(losses.values())).sum().backward()
    objective.zero_grad()
    return counter.get_total_flops()


def _mixed(batch: Batch, config: TrainConfig) -> torch.autocast:
    return torch.autocast(batch.images.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _our_side(objective: Pretraining, batch: Batch, config: TrainConfig) -> Side:
    """As `blip_core.training.train` takes a step."""
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=config.weight_decay, fused=True)
    step = _step(objective, batch)

    def losses() -> dict[str, Tensor]:
        objective.begin_step()
        with _mixed(batch, config):
            return objective(batch, step)

    objective.train()
    return Side(losses, optimizer)


def _their_sides(theirs: TransformersPretraining, batch: Batch, config: TrainConfig) -> dict[str, Side]:
    """The same model and optimiser, called in both ways."""
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=config.weight_decay)
    mask = batch.mask.long()

    def losses(image_once: bool) -> dict[str, Tensor]:
        with _mixed(batch, config):
            return theirs(batch.images, batch.ids, mask, image_once)

    theirs.train()
    ways = {"transformers": False, "transformers_image_once": True}
    return {name: Side(partial(losses, image_once), optimizer) for name, image_once in ways.items()}


def _measure(
    sides: dict[str, Side], repeats: int, device: torch.device, config: TrainConfig
) -> tuple[dict[str, list[Timing]], float]:
    """Timings of all sides by turns, and the best matrix-multiply rate seen between them, in operations a second."""
    for side in sides.values():
        for _ in range(WARM_UPS):
            _timed_step(side, device)
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    peak = 0.0
    for repeat in range(repeats):
        peak = max(peak, matmul_rate(device, dtype))
        for name in sorted(sides, reverse=bool(repeat % 2)):
            timings[name].append(_timed_step(sides[name], device))
    return timings, peak


def _timed_step(side: Side, device: torch.device) -> Timing:
    began = now(device)
    torch.stack(list(side.losses().values())).sum().backward()
    computed = now(device)
    side.optimizer.step()
    side.optimizer.zero_grad()
    return Timing(computed - began, now(device) - computed)


def _table(figures: dict[str, Any]) -> str:
    return "".join(f"{name:>20}  {value}\n" for name, value in figures.items())


if __name__ == "__main__":
    sys.exit(main())
