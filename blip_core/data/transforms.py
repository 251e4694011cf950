"""Pictures to tensors, as BLIP does it: squash to a square, bicubic, normalised by CLIP's mean and deviation."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from blip_core.data.augment import RandomAugment

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

Transform = Callable[[Image.Image], Tensor]


def eval_transform(size: int) -> Transform:
    """RGB picture of any size to a tensor (3, size, size), the aspect not kept."""
    return v2.Compose([_squash(size), *_to_tensor()])


def to_pixels(size: int) -> Transform:
    """The first half of eval_transform: to uint8 (3, size, size), a quarter of the bytes to hand around."""
    return v2.Compose([_squash(size), v2.PILToTensor()])


def normalise(pixels: Tensor) -> Tensor:
    """The other half, on whatever device: uint8 (..., 3, S, S) to what eval_transform gives of the same pictures."""
    return v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), MEAN, DEVIATION)


def train_transform(size: int, crop_scale: float, flip: bool, augment: bool = False) -> Transform:
    """Random crop of at least `crop_scale` of the area (1: no crop), perhaps mirrored, then as in evaluation.

    Draws from torch's global generator. Mirroring makes 'left' and 'right' in captions wrong. With `augment`, BLIP's
    RandomAugment comes after crop and mirror, as in the released code.
    """
    resize = (
        v2.RandomResizedCrop(size, (crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
        if crop_scale < 1.0
        else _squash(size)
    )
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    operations = [RandomAugment()] if augment else []
    return v2.Compose([resize, *mirror, *operations, *_to_tensor()])


def _squash(size: int) -> torch.nn.Module:
    return v2.Resize((size, size), InterpolationMode.BICUBIC)


def _to_tensor() -> list[torch.nn.Module]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
