"""How a model is laid over the processes of a training: whole in each (DDP), or in shares (FSDP2).

Checkpointed and compiled as configured first, both in place, so that no weight changes its name. States go in and
out whole, whatever the layout, so that a training may go on with another number of processes.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from blip_core.med.text_transformer import TextLayer
from blip_core.training.objectives import Objective
from blip_core.training.processes import world
from blip_core.training.recipe import TrainConfig

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# torch 2.14 gave the option another name and warns of the old one
BUFFERS_OPTION = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def new_accelerator(**options: Any) -> Accelerator:
    """The process group as it was launched, or one process.

    accelerate's own precision is one for the whole process, in which trainings of several may follow each other, so
    mixed precision is not its matter here.
    """
    # told nothing, it would not see the other processes of a machine without accelerators
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no", **options)


def distribute(objective: Objective, config: TrainConfig, accelerator: Accelerator) -> nn.Module:
    """The objective as it is to be called in a training step."""
    objective.med.set_gradient_checkpointing(config.gradient_checkpointing)
    if config.compile:
        objective.compile_layers()
    objective.to(accelerator.device)
    if world() == 1:
        return objective
    if config.parallel == "fsdp":
        return _shard(objective, accelerator.device)
    # every process computes the same queue; sending it anew at each step would cost more than the gradients
    options: dict[str, Any] = {BUFFERS_OPTION: False}
    devices = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(objective, devices, **options)


def _shard(objective: Objective, device: torch.device) -> nn.Module:
    mesh = init_device_mesh(device.type, (world(),))
    layers = [layer for layer in objective.modules() if isinstance(layer, (Block, TextLayer))]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
        if isinstance(layer, TextLayer):
            # keys of the images are asked for outside the layer's forward
            register_fsdp_forward_method(layer, "image_keys_values")
    fully_shard(objective, mesh=mesh)
    return objective


@contextmanager
def gradients_summed(model: nn.Module, last: bool) -> Iterator[None]:
    """Within, gradients are summed over processes only in the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scales the gradients to a norm of at most `largest` (0: leaves them), and returns the norm that they had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest or float("inf"))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def model_state(objective: nn.Module) -> dict[str, Tensor]:
    """Every weight and buffer, whole and on the CPU; in other processes than the first it may be empty."""
    return cast(dict[str, Tensor], get_model_state_dict(objective, options=WHOLE))


def load_model_state(objective: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts a whole state into the model, each process its share."""
    set_model_state_dict(objective, dict[str, Any](state), options=WHOLE)


def optimizer_state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by the weight's name, as `model_state`."""
    return cast(dict[str, Any], get_optimizer_state_dict(objective, optimizer, options=WHOLE)).get("state", {})


def load_optimizer_state(
    objective: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]
) -> None:
    """Puts a whole state into the optimiser, each process its share."""
    (group,) = optimizer.param_groups
    names = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    whole: dict[str, Any] = {"state": state, "param_groups": [{**group, "params": names}]}
    set_optimizer_state_dict(objective, optimizer, whole, options=WHOLE)
