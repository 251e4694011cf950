"""The state of a training under way, saved so that a killed run goes on where the last save stood.

Safetensors and JSON in a folder of the step, written in one atomic step before the last one goes: weights, buffers
(queue and momentum encoders among them), AdamW's moments, and the place in the data. There is no random state to
save: each step seeds itself.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip_core.copies import local_copy
from blip_core.errors import TrainingError
from blip_core.files import atomic_folder, read_json, remove_folder, write_json
from blip_core.training import parallel, processes

TENSORS, STEP = "state.safetensors", "state.json"


class Saved(NamedTuple):
    """Where a saved training stands."""

    step: int
    position: Any  # of the data, JSON-like


@dataclass(frozen=True)
class TrainingState:
    """Where the states lie, and the fingerprint of the training that they belong to."""

    folder: Path
    fingerprint: str

    def save(self, objective: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
        """Saves the state in place of the last one. All processes take part, and the first one writes."""
        tensors = {f"module.{name}": tensor for name, tensor in parallel.model_state(objective).items()}
        for name, moments in parallel.optimizer_state(objective, optimizer).items():
            tensors |= {f"optimizer.{moment}.{name}": tensor for moment, tensor in moments.items()}
        if not processes.is_first():
            return
        target = self.folder / f"{saved.step:09d}"
        with atomic_folder(target, marker=STEP) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
            write_json(temporary / STEP, {**saved._asdict(), "fingerprint": self.fingerprint})
        for older in self.folder.iterdir():
            if older != target:
                remove_folder(older)

    def restore(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Saved | None:
        """Puts the last saved state of the same training into model and optimiser; None where there is none."""
        folder = max(self.folder.glob(f"[0-9]*/{STEP}"), default=None)
        if folder is None:
            return None
        saved = read_json(folder)
        if saved.pop("fingerprint") != self.fingerprint:
            return None
        tensors = self._tensors(folder.parent / TENSORS)
        parallel.load_model_state(objective, _with_prefix(tensors, "module."))
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _with_prefix(tensors, "optimizer.").items():
            moment, _, parameter = name.partition(".")
            moments.setdefault(parameter, {})[moment] = tensor
        parallel.load_optimizer_state(objective, optimizer, moments)
        return Saved(**saved)

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(local_copy(path))
        except (SafetensorError, OSError) as error:
            raise TrainingError(f"{path}: torn ({error}); remove {self.folder} to start anew") from error

    def remove(self) -> None:
        """Takes the states away: the training is over."""
        remove_folder(self.folder)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
