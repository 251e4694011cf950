"""The state of a training under way, saved so that a killed run goes on where the last save stood.

Safetensors and JSON, written in one atomic step: weights, buffers (queue and momentum encoders among them) and
AdamW's moments. There is no random state to save: each step seeds itself.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip_core.errors import TrainingError
from blip_core.files import atomic_folder, read_json, write_json

TENSORS, STEP = "state.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingState:
    """Where the state lies, and the fingerprint of the training that it belongs to."""

    folder: Path
    fingerprint: str

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Saves the state after `step` steps, in place of the last one."""
        tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{moment}": moments[moment] for moment in MOMENTS}
        with atomic_folder(self.folder) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
            write_json(temporary / STEP, {"step": step, "fingerprint": self.fingerprint})

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Puts a saved state of the same training into module and optimiser; returns its step, or 0 without one."""
        if not (self.folder / STEP).is_file():
            return 0
        saved = read_json(self.folder / STEP)
        if saved["fingerprint"] != self.fingerprint:
            return 0
        try:
            tensors = load_file(self.folder / TENSORS)
        except (SafetensorError, OSError) as error:
            raise TrainingError(f"{self.folder / TENSORS}: torn ({error}); remove the folder to start anew") from error
        module.load_state_dict(_with_prefix(tensors, "module."))
        _restore_moments(optimizer, tensors, saved["step"])
        return saved["step"]


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _restore_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], step: int) -> None:
    moments: dict[int, dict[str, Any]] = {}
    for name, tensor in _with_prefix(tensors, "optimizer.").items():
        index, moment = name.split(".")
        moments.setdefault(int(index), {"step": torch.tensor(float(step))})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
