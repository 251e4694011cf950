"""A MED that is only used, not trained: in float32, in bfloat16, or with int8 linear layers for what concerns images.

On a CPU, float32 goes through oneDNN, which does as well as MKL on Intel's processors and twice as well on AMD's.
int8 is dynamic: weights are scaled once for each output, activations as they come for each token, so that what an
image gives does not depend on those beside it. The text side, a tenth of the work, stays in float32: rounding there
moves ITM's answers five times as much as in all of the image encoder.
"""

from collections.abc import Callable, Collection
from typing import Literal, cast

import torch
from torch import Tensor, nn

from blip_core.errors import ConfigError
from blip_core.med.med import MED

Precision = Literal["fp32", "bf16", "int8"]
MOST = 127  # of int8; -128 is left out, so that the scale is the same on both sides
# What the image encoder takes at once on a CPU: with more, its activations leave the caches, and the allocator gives
# so large pieces back to the system after every layer.
PIXELS_AT_ONCE = 4 * 224 * 224


class OneDNNLinear(nn.Linear):
    """A linear layer through oneDNN, for inference on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer whose products are those of 8-bit integers, summed without a rounding error."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = _scale(weight)
        self.register_buffer("weight", (weight / scale).round_().to(torch.int8).T.contiguous())  # (in, out)
        self.register_buffer("scale", scale.squeeze(1))  # (out,)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = input.flatten(0, -2)
        scale = _scale(rows)
        summed = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight).to(input.dtype)
        return summed.mul_(scale).mul_(self.scale).add_(self.bias).view(*input.shape[:-1], -1)


def prepare(med: MED, precision: Precision, compile: bool = False) -> None:
    """Makes a MED ready for use in that precision, for good: it can be trained and saved no more.

    Args:
        compile: compiles its layers, if it is on a GPU.

    Raises ConfigError for int8 elsewhere than on a CPU.
    """
    on_cpu = _device(med).type == "cpu"
    if precision == "int8" and not on_cpu:
        raise ConfigError(f"precision int8: is for CPUs, and the model is on {_device(med)}; expected bf16 or fp32")
    if precision == "bf16":
        med.to(torch.bfloat16)  # which torch itself takes to oneDNN where the processor has it
    if precision == "int8":
        _replace_linear(med.image_encoder, Int8Linear)
        for layer in med.text.layers:
            _replace_linear(cast(nn.Module, layer.cross_attention), Int8Linear, ("key", "value"))
    if precision != "bf16" and on_cpu and torch.backends.mkldnn.is_available():
        _replace_linear(med, _through_onednn)
    if compile and not on_cpu:
        med.compile_layers()


def encode_images(med: MED, images: Tensor) -> Tensor:
    """`med.encode_image` in the model's own precision: (B, 3, S, S) to (B, N, image width); on a CPU in small parts."""
    images = images.to(_device(med), next(med.image_encoder.parameters()).dtype)
    if images.device.type != "cpu":
        return med.encode_image(images)
    part = max(1, PIXELS_AT_ONCE // images[0, 0].numel())
    return torch.cat([med.encode_image(some) for some in images.split(part)])


def _device(med: MED) -> torch.device:
    return next(med.parameters()).device


def _scale(rows: Tensor) -> Tensor:
    """What one step of int8 stands for in each row (R, D): (R, 1); a row of zeros stays one."""
    return rows.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(rows.dtype).tiny * MOST) / MOST


def _through_onednn(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = OneDNNLinear
    return linear


def _replace_linear(
    module: nn.Module, replacement: Callable[[nn.Linear], nn.Module], names: Collection[str] = ()
) -> None:
    """Puts replacements in the place of all linear layers below a module, or of those with one of the names."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and (not names or name in names):
            setattr(module, name, replacement(child))
        else:
            _replace_linear(child, replacement, names)
