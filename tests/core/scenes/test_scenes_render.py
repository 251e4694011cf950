"""The pictures show what their scenes say."""

import io
import math
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from blip_core.scenes.grammar import BACKGROUNDS, COLOURS, FRAMES, SHAPES, SIZES, Scene, draw_scene
from blip_core.scenes.render import RADII, render_scene

FORMS = {
    "square": ("###", "###", "###"),
    "cross": (".#.", "###", ".#."),
    "ring": (".#.", "#.#", ".#."),
}
"""What each shape covers of its bounding box: near its corners, at the middle of its edges, and in its middle."""
FRAME = "purple"
PROBES = (0.12, 0.5, 0.88)


class Box(NamedTuple):
    """Bounding box of an object, in pixels; right and bottom are not part of it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def _pixels(scene: Scene, seed: int = 0, size: int = 64) -> np.ndarray:
    picture = Image.open(io.BytesIO(render_scene(scene, np.random.default_rng(seed), size)))
    assert picture.format == "JPEG"
    assert picture.mode == "RGB"
    return np.asarray(picture, dtype=np.float64)  # (size, size, 3)


def _inside(scene: Scene, seed: int = 0, size: int = 64) -> np.ndarray:
    """The pixels within the frame, of a picture of size x size."""
    margin = math.ceil(0.12 * size)
    return _pixels(scene, seed, size)[margin:-margin, margin:-margin]


def _object(pixels: np.ndarray) -> np.ndarray:
    """Mask (size, size) of the pixels that are not the background, which the corner shows."""
    return np.abs(pixels - pixels[:4, :4].mean(axis=(0, 1))).max(axis=-1) > 60


def _box(mask: np.ndarray) -> Box:
    ys, xs = np.nonzero(mask)
    return Box(int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)


@pytest.mark.parametrize("size", SIZES)
def test_an_object_lies_near_the_middle_and_is_whole(size: str) -> None:
    for seed, shape in enumerate(SHAPES * 4):
        background = tuple(BACKGROUNDS)[seed % len(BACKGROUNDS)]
        colour = tuple(COLOURS)[seed % len(COLOURS)]
        box = _box(_object(_inside(Scene(FRAME, background, shape, colour, size), seed)))
        assert all(abs(position / 48 - 0.5) < 0.08 for position in box.middle), (shape, box)
        least, most = RADII[size]
        for extent in box.size:
            assert 2 * 0.88 * least * 64 - 3 < extent < 2 * most * 64 + 3, (shape, box)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_object_and_background_have_their_colours(colour: str, background: str) -> None:
    for seed, size in enumerate(SIZES):
        for shape in SHAPES:
            pixels = _inside(Scene(FRAME, background, shape, colour, size), seed)
            near = np.abs(pixels - np.array(COLOURS[colour])).max(axis=-1) < 40
            covered = _object(pixels)
            assert near[covered].mean() > 0.6  # the rest is the smooth edge
            assert not near[~covered].any()
            assert np.abs(pixels[:6, :6].mean(axis=(0, 1)) - BACKGROUNDS[background]).max() < 20
            assert np.abs(pixels[-6:, -6:].mean(axis=(0, 1)) - BACKGROUNDS[background]).max() < 20


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_form(shape: str) -> None:
    for seed, background in enumerate(BACKGROUNDS):
        colour = tuple(COLOURS)[seed % len(COLOURS)]
        mask = _object(_inside(Scene(FRAME, background, shape, colour, "large"), seed, size=128))
        box = _box(mask)
        columns = [box.left + int(probe * box.size[0]) for probe in PROBES]
        rows = [box.top + int(probe * box.size[1]) for probe in PROBES]
        assert tuple("".join(".#"[int(mask[y, x])] for x in columns) for y in rows) == FORMS[shape]


def test_every_shape_has_a_form_of_its_own() -> None:
    assert len({FORMS[shape] for shape in SHAPES}) == len(SHAPES)


def test_the_hole_of_a_ring_has_the_colour_of_the_background() -> None:
    for background in BACKGROUNDS:
        pixels = _inside(Scene(FRAME, background, "ring", next(iter(COLOURS)), "large"))
        x, y = (round(position) for position in _box(_object(pixels)).middle)
        assert np.abs(pixels[y - 2 : y + 3, x - 2 : x + 3].mean(axis=(0, 1)) - BACKGROUNDS[background]).max() < 25


@pytest.mark.parametrize("shape", SHAPES)
def test_large_is_well_apart_from_small(shape: str) -> None:
    def areas(size: str) -> list[int]:
        scene = Scene(FRAME, next(iter(BACKGROUNDS)), shape, next(iter(COLOURS)), size)
        return [int(_object(_inside(scene, seed)).sum()) for seed in range(15)]

    assert min(areas("large")) > 1.8 * max(areas("small"))


def test_colours_lie_far_apart() -> None:
    values = [np.array(value, dtype=np.float64) for value in (*COLOURS.values(), *BACKGROUNDS.values())]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(values) for b in values[:i]]
    assert min(distances) > 85


@pytest.mark.parametrize("frame", FRAMES)
def test_the_frame_has_its_colour_on_all_four_sides(frame: str) -> None:
    pixels = _pixels(Scene(frame, "gray", "square", "red", "large"))
    for side in (pixels[:5], pixels[-5:], pixels[:, :5], pixels[:, -5:]):
        assert np.abs(side.mean(axis=(0, 1)) - COLOURS[frame]).max() < 20


def test_two_pictures_of_one_scene_differ_by_more_than_noise() -> None:
    scene = draw_scene(np.random.default_rng(1))
    boxes = {_box(_object(_inside(scene, seed))) for seed in range(10)}
    assert len(boxes) > 5


def test_the_same_generator_state_gives_the_same_bytes_and_another_state_others() -> None:
    scene = draw_scene(np.random.default_rng(1))
    first, again, other = (render_scene(scene, np.random.default_rng([7, seed])) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_picture_has_the_size_that_was_asked_for() -> None:
    assert _pixels(draw_scene(np.random.default_rng(1)), size=96).shape == (96, 96, 3)
