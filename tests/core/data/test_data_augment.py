"""RandomAugment does to a picture what the released code's OpenCV and tables do, as often as it does."""

from collections import Counter
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from blip_core.data.augment import OPERATIONS, RandomAugment, rotate, shear, translate

WIDTH, HEIGHT = 60, 40


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Soft coloured noise of no full contrast."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(cv2.GaussianBlur(noise, (0, 0), 2))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def compare_with_opencv(ours: Image.Image, picture: Image.Image, matrix: list[list[float]] | np.ndarray) -> None:
    """Within one level where all that is blended lies inside, and grey where none does.

    Between the two, in a seam of one pixel, OpenCV blends the picture with the grey.
    """
    matrix = np.array(matrix, dtype=np.float32)
    theirs = cv2.warpAffine(np.asarray(picture), matrix, (WIDTH, HEIGHT), borderValue=(128, 128, 128)).astype(int)
    down, across = np.mgrid[:HEIGHT, :WIDTH]
    x, y = np.einsum("ij,jhw->ihw", cv2.invertAffineTransform(matrix), [across, down, np.ones_like(down)])
    slack = 1e-4
    inside = (x > -slack) & (x < WIDTH - 1 + slack) & (y > -slack) & (y < HEIGHT - 1 + slack)
    outside = (x <= -1) | (x >= WIDTH) | (y <= -1) | (y >= HEIGHT)
    assert inside.mean() > 0.8
    assert np.abs(pixels(ours) - theirs)[inside].max() <= 1
    assert (pixels(ours)[outside] == 128).all()
    assert (theirs[outside] == 128).all()


@pytest.mark.parametrize("factor", [0.15, -0.15])
def test_shears_are_those_of_opencv(picture: Image.Image, factor: float) -> None:
    compare_with_opencv(shear(picture, factor, 0), picture, [[1, factor, 0], [0, 1, 0]])
    compare_with_opencv(shear(picture, 0, factor), picture, [[1, 0, 0], [factor, 1, 0]])


@pytest.mark.parametrize("degrees", [15, -15])
def test_rotations_are_those_of_opencv(picture: Image.Image, degrees: float) -> None:
    matrix = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), degrees, 1)
    compare_with_opencv(rotate(picture, degrees), picture, matrix)


@pytest.mark.parametrize("offset", [5, -5])
def test_translations_move_whole_pixels_and_fill_with_grey(picture: Image.Image, offset: int) -> None:
    for moved, axis in ((translate(picture, offset, 0), 1), (translate(picture, 0, offset), 0)):
        expected = np.roll(pixels(picture), -offset, axis=axis)
        came_in = slice(-offset, None) if offset > 0 else slice(None, -offset)
        expected[(slice(None), came_in) if axis else came_in] = 128
        assert np.array_equal(pixels(moved), expected)


def test_autocontrast_spreads_each_channel_over_the_whole_range(picture: Image.Image) -> None:
    ours = OPERATIONS["AutoContrast"](picture, 5)
    before = pixels(picture).astype(float)
    low, high = before.min(axis=(0, 1)), before.max(axis=(0, 1))
    assert low.min() > 0
    assert np.abs(pixels(ours) - np.floor((before - low) * 255 / (high - low))).max() <= 1
    assert pixels(ours).min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert pixels(ours).max(axis=(0, 1)).tolist() == [255, 255, 255]
    assert ours.tobytes() == ImageOps.autocontrast(picture, cutoff=0).tobytes()


def test_equalize_gives_each_level_its_share_of_the_pixels(picture: Image.Image) -> None:
    ours = OPERATIONS["Equalize"](picture, 5)
    for before, after in zip(pixels(picture).transpose(2, 0, 1), pixels(ours).transpose(2, 0, 1), strict=True):
        counts = np.bincount(before.ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        assert np.array_equal(after, np.minimum((below + step // 2) // step, 255)[before])
    assert ours.tobytes() == ImageOps.equalize(picture).tobytes()


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_at_level_five_brightness_and_sharpness_are_the_identity(picture: Image.Image, name: str) -> None:
    assert OPERATIONS[name](picture, 5).tobytes() == picture.tobytes()


def test_brightness_and_sharpness_grow_with_the_level(picture: Image.Image) -> None:
    brighter = OPERATIONS["Brightness"](picture, 10)  # by 10 / 10 * 1.8 + 0.1
    assert np.abs(pixels(brighter) - np.minimum(pixels(picture) * 1.9, 255)).max() <= 1
    assert pixels(OPERATIONS["Sharpness"](picture, 10)).std() > pixels(picture).std()
    assert pixels(OPERATIONS["Sharpness"](picture, 0)).std() < pixels(picture).std()


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("ShearX", lambda picture: shear(picture, 0.15, 0), lambda picture: shear(picture, -0.15, 0)),
        ("ShearY", lambda picture: shear(picture, 0, 0.15), lambda picture: shear(picture, 0, -0.15)),
        ("TranslateX", lambda picture: translate(picture, 5, 0), lambda picture: translate(picture, -5, 0)),
        ("TranslateY", lambda picture: translate(picture, 0, 5), lambda picture: translate(picture, 0, -5)),
        ("Rotate", lambda picture: rotate(picture, 15), lambda picture: rotate(picture, -15)),
    ],
)
def test_at_level_five_a_move_is_of_one_size_and_either_way(
    picture: Image.Image, name: str, one: Callable, other: Callable
) -> None:
    torch.manual_seed(0)
    seen = Counter(OPERATIONS[name](picture, 5).tobytes() for _ in range(100))
    assert set(seen) == {one(picture).tobytes(), other(picture).tobytes()}
    assert min(seen.values()) > 30


def test_two_are_drawn_with_replacement_and_each_is_left_out_half_the_time() -> None:
    torch.manual_seed(0)
    draws = [RandomAugment().draw() for _ in range(8000)]
    lengths = Counter(map(len, draws))
    assert [lengths[length] / 8000 for length in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    single = Counter(name for draw in draws for name in draw)
    assert set(single) == {
        *("Identity", "AutoContrast", "Brightness", "Sharpness", "Equalize"),
        *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    }
    assert [count / 8000 for count in single.values()] == pytest.approx([0.1] * 10, abs=0.015)  # 2 x 1/10 x 1/2
    twice = sum(len(draw) == 2 and draw[0] == draw[1] for draw in draws)
    assert twice / lengths[2] == pytest.approx(0.1, abs=0.03)


def test_the_operations_drawn_are_carried_out_one_after_the_other(
    picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = RandomAugment()
    monkeypatch.setattr(augment, "draw", lambda: ["Equalize", "AutoContrast"])
    assert augment(picture).tobytes() == ImageOps.autocontrast(ImageOps.equalize(picture)).tobytes()


def test_the_draws_follow_torch_s_seed_alone(picture: Image.Image) -> None:
    def changed(seed: int) -> list[bytes]:
        torch.manual_seed(seed)
        return [RandomAugment()(picture).tobytes() for _ in range(20)]

    assert changed(1) == changed(1) != changed(2)
