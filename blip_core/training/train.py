"""The training loop: AdamW, warm-up and cosine decay, clipping, metrics, and resume, through accelerate.

What is trained is a module that takes a batch and gives named losses; pre-training and fine-tuning differ in
nothing else. All chance in a step follows from (seed, step, process), so a resumed run repeats an unbroken one.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from blip_core.data.pairs import PairBatch, PairStream
from blip_core.errors import TrainingError
from blip_core.training.recipe import TrainConfig
from blip_core.training.state import TrainingState

Progress = Callable[[int, int, Mapping[str, float]], None]


def train(
    name: str,
    module: nn.Module,
    stream: Callable[[int, int], PairStream],
    config: TrainConfig,
    seed: int,
    state: TrainingState,
    metrics: Path,
    progress: Progress | None = None,
) -> None:
    """Trains `module` in place, from the last saved state if there is one.

    Args:
        name: of the model, for the metrics file.
        module: called with a PairBatch and the step, gives its losses by name.
        stream: makes the stream of (rank, world).
        state: where the run's state is saved and found again.
        metrics: JSON-lines file, one object each `log_every` steps; continued on resume.
        progress: called after each step with (step, steps, losses).

    Raises TrainingError where the loss is no longer a number, or the saved state is torn.
    """
    # fine-tuning leaves one face's parameters without a gradient, which DDP has to be told
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # accelerate's own precision is one for the whole process, in which trainings of both may follow each other
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[unused])
    mixed = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    start = state.restore(module, optimizer)
    prepared, optimizer = accelerator.prepare(module, optimizer)
    prepared.train()
    log = MetricsLog(metrics, name, start)
    batches = stream(accelerator.process_index, accelerator.num_processes).batches(start)
    began = time.monotonic()
    for step, batch in zip(range(start, config.steps), batches, strict=False):
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with mixed:
            losses = prepared(_to(batch, accelerator.device), step)
        loss = torch.stack(list(losses.values())).sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        values = {objective: value.item() for objective, value in losses.items()}
        if not math.isfinite(sum(values.values())):
            raise TrainingError(f"training of {name}: loss is {values} at step {step}; lower the learning rate")
        if accelerator.is_main_process:
            if done % config.log_every == 0 or done == config.steps:
                seen = (done - start) * config.batch_size * accelerator.num_processes
                log.write(done, values, rate, seen / (time.monotonic() - began))
            if done % config.save_every == 0 and done < config.steps:
                state.save(accelerator.unwrap_model(prepared), optimizer, done)
            if progress:
                progress(done, config.steps, values)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up from zero, then cosine to the final rate at `config.steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    fall = (1 + math.cos(math.pi * min(1.0, share))) / 2
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * fall


def _to(batch: PairBatch, device: torch.device) -> PairBatch:
    return batch._replace(images=batch.images.to(device), image_ids=batch.image_ids.to(device))


class MetricsLog:
    """The metrics file: one JSON object a line; rows after the step resumed from are taken back."""

    def __init__(self, path: Path, model: str, start: int) -> None:
        self.path = path
        self.model = model
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in self._rows() if row["step"] <= start] if start else []
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        # a line torn by a kill belongs to a step after the saved state
        return [json.loads(line) for line in lines if line.endswith("}")]

    def write(self, step: int, losses: Mapping[str, float], rate: float, images_per_second: float) -> None:
        row = {
            "model": self.model,
            "step": step,
            "loss": sum(losses.values()),
            **{objective: losses.get(objective) for objective in ("itc", "itm", "lm")},
            "learning_rate": rate,
            "images_per_second": round(images_per_second, 2),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
