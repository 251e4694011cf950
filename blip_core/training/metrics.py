"""The curve of a training: a JSON-lines file, trackers that the user asked for, and a look at ITM's start."""

import importlib.util
import json
import statistics
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from blip_core.errors import TrainingError
from blip_core.files import append_text, make_folder
from blip_core.training.recipe import TrainConfig

OBJECTIVES = ("itc", "itm", "lm")
# -(ln 1/3 + 2 ln 2/3) / 3: what a model pays for answering 'no match' with the share of negatives, whatever it sees.
ITM_PRIOR = 0.6365
ITM_NEAR_PRIOR = 0.005
ITM_SHARE = 0.9  # of the steps looked at; a batch may have its luck
ITM_PATIENCE = 200


class Measured(NamedTuple):
    """What a row of the curve says beside the losses."""

    learning_rate: float
    gradient_norm: float  # before clipping
    images_per_second: float  # of all processes, since the last row
    data_wait: float  # share of the time since the last row that the first process waited for its batch, 0..1
    undecodable: int  # images passed over so far, in all processes


class ITMStuckWarning(UserWarning):
    """ITM has learnt nothing yet."""


class ITMWatch:
    """Warns once when ITM's loss stays at that of a constant answer for `patience` steps after the warm-up."""

    def __init__(self, warmup_steps: int, patience: int = ITM_PATIENCE) -> None:
        self.warmup_steps = warmup_steps
        self.recent: deque[float] = deque(maxlen=patience)
        self.warned = False

    def see(self, step: int, itm: float | None) -> None:
        """Takes the loss of a step; None where ITM is not trained."""
        if itm is None or self.warned or step < self.warmup_steps:
            return
        self.recent.append(itm)
        if len(self.recent) == self.recent.maxlen and self._at_the_prior():
            self.warned = True
            warnings.warn(
                f"ITM's loss has stayed at {statistics.fmean(self.recent):.4f} for {len(self.recent)} steps, until "
                f"step {step}: {ITM_PRIOR} is what a constant answer gets with two negatives to a match, so the "
                "image-grounded encoder tells nothing apart yet. It may still start; if it does not, train longer, "
                "raise the learning rate or the batch size, or look whether texts and images belong together",
                ITMStuckWarning,
                stacklevel=2,
            )

    def _at_the_prior(self) -> bool:
        near = sum(abs(loss - ITM_PRIOR) <= ITM_NEAR_PRIOR for loss in self.recent)
        return near >= ITM_SHARE * len(self.recent)


class MetricsLog:
    """The metrics file: one JSON object a line; rows after the step resumed from are taken back."""

    def __init__(self, path: Path, model: str, start: int) -> None:
        self.path = path
        self.model = model
        make_folder(path.parent)
        kept = [row for row in self._rows() if row["step"] <= start] if start else []
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        # a line torn by a kill belongs to a step after the saved state
        return [json.loads(line) for line in lines if line.endswith("}")]

    def write(self, step: int, losses: Mapping[str, float], measured: Measured) -> None:
        """One row: the losses and their sum, and what was measured beside them."""
        row = {
            "model": self.model,
            "step": step,
            "loss": sum(losses.values()),
            **{objective: losses.get(objective) for objective in OBJECTIVES},
            **measured._asdict(),
        }
        append_text(self.path, json.dumps(row) + "\n")


def check_trackers(config: TrainConfig) -> None:
    """Raises TrainingError where a wanted tracker is not installed."""
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise TrainingError(f"trackers: {tracker} is not installed; pip install {tracker}")


def start_trackers(accelerator: Accelerator, name: str, config: TrainConfig) -> None:
    """Opens the trackers that accelerate was made with, a run for each model."""
    if config.trackers:
        plain = {key: value for key, value in asdict(config).items() if isinstance(value, (bool, int, float, str))}
        beside_the_metrics = {"wandb": {"dir": accelerator.project_dir}}
        accelerator.init_trackers(f"capfilt-{name}", plain, init_kwargs=beside_the_metrics)
