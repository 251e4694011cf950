"""BLIP's RandomAugment: a few random operations on a picture, of one fixed strength, with no change of colour.

As transform/randaugment.py of the released code, which works on arrays through OpenCV; here on Pillow pictures. The
outermost pixels differ: OpenCV blends them with the grey that comes in, Pillow does not.
"""

import math
from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

MAX_LEVEL = 10
GREY = [128.0, 128.0, 128.0]

Operation = Callable[[Image.Image, int], Image.Image]


class RandomAugment:
    """Draws operations with replacement and leaves each out with probability 1/2, by torch's global generator.

    Args:
        count: how many are drawn (N of the released code).
        level: their strength, 0..10 (M). At 5 brightness and sharpness change nothing, shears are by 0.15,
            translations by 5 pixels, rotations by 15 degrees.
    """

    def __init__(self, count: int = 2, level: int = 5) -> None:
        self.count = count
        self.level = level

    def __call__(self, picture: Image.Image) -> Image.Image:
        """An RGB picture, changed or not; of the same size."""
        for name in self.draw():
            picture = OPERATIONS[name](picture, self.level)
        return picture

    def draw(self) -> list[str]:
        """The names of the operations that are carried out this time, in their order."""
        names = list(OPERATIONS)
        drawn = torch.randint(len(names), (self.count,)).tolist()
        kept = (torch.rand(self.count) < 0.5).tolist()
        return [names[place] for place, keep in zip(drawn, kept, strict=True) if keep]


def _identity(picture: Image.Image, level: int) -> Image.Image:
    return picture


def _autocontrast(picture: Image.Image, level: int) -> Image.Image:
    return functional.autocontrast(picture)


def _equalize(picture: Image.Image, level: int) -> Image.Image:
    return functional.equalize(picture)


def _brightness(picture: Image.Image, level: int) -> Image.Image:
    return functional.adjust_brightness(picture, _enhancement(level))


def _sharpness(picture: Image.Image, level: int) -> Image.Image:
    return functional.adjust_sharpness(picture, _enhancement(level))


def _shear_x(picture: Image.Image, level: int) -> Image.Image:
    return shear(picture, _either_way(level / MAX_LEVEL * 0.3), 0.0)


def _shear_y(picture: Image.Image, level: int) -> Image.Image:
    return shear(picture, 0.0, _either_way(level / MAX_LEVEL * 0.3))


def _translate_x(picture: Image.Image, level: int) -> Image.Image:
    return translate(picture, _either_way(level / MAX_LEVEL * 10), 0.0)


def _translate_y(picture: Image.Image, level: int) -> Image.Image:
    return translate(picture, 0.0, _either_way(level / MAX_LEVEL * 10))


def _rotate(picture: Image.Image, level: int) -> Image.Image:
    return rotate(picture, _either_way(level / MAX_LEVEL * 30))


OPERATIONS: dict[str, Operation] = {
    "Identity": _identity,
    "AutoContrast": _autocontrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "Equalize": _equalize,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}


def shear(picture: Image.Image, across: float, down: float) -> Image.Image:
    """Moves pixel (x, y) to (x + across y, y + down x), counted from the centre of the upper left pixel."""
    degrees = [-math.degrees(math.atan(factor)) for factor in (across, down)]  # torchvision turns by -tan
    return _affine(picture, shear_by=degrees, center=[0.5, 0.5])


def translate(picture: Image.Image, across: float, down: float) -> Image.Image:
    """Moves the picture to the left and up, in pixels; that it is left and not right is the released code's way."""
    return _affine(picture, move_by=[-across, -down])


def rotate(picture: Image.Image, degrees: float) -> Image.Image:
    """Turns the picture counter-clockwise about the pixel at (width / 2, height / 2)."""
    return _affine(picture, angle=-degrees, center=[picture.width / 2 + 0.5, picture.height / 2 + 0.5])


def _affine(
    picture: Image.Image,
    angle: float = 0.0,
    move_by: list[float] | None = None,
    shear_by: list[float] | None = None,
    center: list[float] | None = None,
) -> Image.Image:
    return functional.affine(
        picture,
        angle=angle,
        translate=move_by or [0.0, 0.0],
        scale=1.0,
        shear=shear_by or [0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=GREY,
        center=center,
    )


def _enhancement(level: int) -> float:
    return level / MAX_LEVEL * 1.8 + 0.1


def _either_way(size: float) -> float:
    return size if torch.rand(()).item() < 0.5 else -size
