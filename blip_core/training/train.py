"""The training loop: AdamW, schedule, clipping, accumulation, metrics, and resume, in one process or many.

What is trained is an `Objective`; pre-training and fine-tuning differ in nothing else. All chance in a step follows
from (seed, step, process), so a resumed run repeats an unbroken one.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blip_core.data.stream import PairBatch, PairStream, merge_positions
from blip_core.errors import TrainingError
from blip_core.med.lm import predicted
from blip_core.stores import scratch_folder
from blip_core.training import parallel, processes
from blip_core.training.metrics import ITMWatch, Measured, MetricsLog, check_trackers, start_trackers
from blip_core.training.objectives import Batch, Objective, Step
from blip_core.training.recipe import TrainConfig
from blip_core.training.schedule import learning_rate
from blip_core.training.state import Saved, TrainingState

Progress = Callable[[int, int, Mapping[str, float]], None]


def train(
    name: str,
    objective: Objective,
    stream: Callable[[int, int], PairStream],
    config: TrainConfig,
    seed: int,
    state: TrainingState,
    metrics: Path,
    progress: Progress | None = None,
) -> int:
    """Trains `objective`, from the last saved state if there is one.

    Returns how many images were passed over because they cannot be decoded, in all processes.

    Args:
        name: of the model, for the metrics file.
        stream: makes the stream of (rank, world), whose batches are micro-batches.
        state: where the run's state is saved and found again.
        metrics: JSON-lines file, one object each `log_every` steps; continued on resume.
        progress: called in the first process after each step with (step, steps, losses).

    Raises ConfigError where the batch does not divide among the processes, TrainingError where the loss is no longer
    a number or the saved state is torn.
    """
    check_trackers(config)
    accelerator = parallel.new_accelerator(
        log_with=list(config.trackers) or None, project_dir=str(scratch_folder(metrics.parent))
    )
    model = parallel.distribute(objective, config, accelerator)
    model.train()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in objective.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    saved = state.restore(objective, optimizer) or Saved(0, None)
    data = stream(processes.rank(), processes.world())
    stepper = _Stepper(objective, model, optimizer, config, seed, accelerator.device)
    log = _Log(name, config, accelerator, metrics, data, saved.step, progress)
    # closed, the workers end at once, whatever ended the training
    with closing(data.batches(saved.position)) as batches:
        for step in range(saved.step, config.steps):
            losses, norm = stepper.step(step, batches)
            log.see(step + 1, losses, norm)
            if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                position = merge_positions(processes.gather_objects(data.position))
                state.save(objective, optimizer, Saved(step + 1, position))
    log.close()
    return _undecodable(data)


def _undecodable(data: PairStream) -> int:
    return sum(processes.gather_objects(data.undecodable))


class _Stepper:
    """One optimiser step after another."""

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.objective = objective
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.seed = seed
        self.device = device
        self.mixed = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def step(self, number: int, batches: Iterator[PairBatch]) -> tuple[dict[str, float], float]:
        """Takes the step; returns its losses, the mean over all processes, and the gradient's norm."""
        micro_batches = [self.objective.tokenize(next(batches), self.device) for _ in range(self.config.accumulation)]
        chance = self.seed * 1_000_003 + number
        torch.manual_seed(chance * 1_009 + processes.rank())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.config)
        self.objective.begin_step()
        losses = self._backward(micro_batches, number, chance)
        norm = parallel.clip_gradients(self.model, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        means = processes.mean(torch.stack(list(losses.values()))).tolist()
        return dict(zip(losses, means, strict=True)), norm

    def _backward(self, micro_batches: list[Batch], number: int, chance: int) -> dict[str, Tensor]:
        count = len(micro_batches)
        counted = [predicted(batch.mask, self.objective.prompt_length).sum() for batch in micro_batches]
        tokens = processes.mean(torch.stack(counted).sum().float()) / count
        losses: dict[str, Tensor] = {}
        for place, batch in enumerate(micro_batches):
            step = Step(number, chance * 1_009 + place, tokens)
            with parallel.gradients_summed(self.model, last=place == count - 1):
                with self.mixed:
                    found = self.model(batch, step)
                (torch.stack(list(found.values())).sum() / count).backward()
            for objective, loss in found.items():
                losses[objective] = losses.get(objective, 0.0) + loss.detach() / count
        return losses


class _Log:
    """What a training says of itself: its curve, its trackers, its progress, and that it has gone wrong."""

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        accelerator: Accelerator,
        metrics: Path,
        data: PairStream,
        start: int,
        progress: Progress | None,
    ) -> None:
        self.name = name
        self.config = config
        self.accelerator = accelerator
        self.data = data
        self.progress = progress
        self.file = MetricsLog(metrics, name, start) if processes.is_first() else None
        self.watch = ITMWatch(config.warmup_steps)
        self.step, self.began, self.waited = start, time.monotonic(), data.waited
        start_trackers(accelerator, name, config)

    def see(self, done: int, losses: dict[str, float], norm: float) -> None:
        """After each step, in every process; raises TrainingError where a loss is no number."""
        if not math.isfinite(sum(losses.values())):
            raise TrainingError(
                f"training of {self.name}: loss is {losses} at step {done - 1}; lower the learning rate"
            )
        if done % self.config.log_every == 0 or done == self.config.steps:
            measured = self._measure(done, norm)
            if self.file:
                self.file.write(done, losses, measured)
            self.accelerator.log({**losses, **measured._asdict()}, step=done)
        if self.file:
            self.watch.see(done, losses.get("itm"))
            if self.progress:
                self.progress(done, self.config.steps, losses)

    def _measure(self, done: int, norm: float) -> Measured:
        """What is known of the steps since the last row."""
        now, waited = time.monotonic(), self.data.waited
        seconds = max(now - self.began, 1e-9)
        measured = Measured(
            learning_rate=learning_rate(done - 1, self.config),
            gradient_norm=norm,
            images_per_second=round((done - self.step) * self.config.batch_size / seconds, 2),
            data_wait=round((waited - self.waited) / seconds, 4),
            undecodable=_undecodable(self.data),
        )
        self.step, self.began, self.waited = done, now, waited
        return measured

    def close(self) -> None:
        """Ends the trackers; accelerate's `end_training` would end the process group as well."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
