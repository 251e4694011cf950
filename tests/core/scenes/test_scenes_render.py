"""The pictures show what their scenes say."""

import io
from itertools import product

import numpy as np
import pytest
from PIL import Image

from blip_core.scenes.grammar import BACKGROUNDS, COLOURS, SHAPES, Scene, SceneObject, draw_scene
from blip_core.scenes.render import render_scene

CORNERS = {"left": (0, 32, 0, 64), "right": (32, 64, 0, 64), "top": (0, 64, 0, 32), "bottom": (0, 64, 32, 64)}
"""The half of the picture for each place: x from, x to, y from, y to."""


def _pixels(scene: Scene, seed: int = 0, size: int = 64) -> np.ndarray:
    picture = Image.open(io.BytesIO(render_scene(scene, np.random.default_rng(seed), size)))
    assert picture.format == "JPEG"
    assert picture.mode == "RGB"
    return np.asarray(picture, dtype=np.float64)  # (size, size, 3)


def _near(pixels: np.ndarray, colour: tuple[int, int, int], tolerance: float = 60.0) -> np.ndarray:
    return np.abs(pixels - np.array(colour)).max(axis=-1) < tolerance


@pytest.mark.parametrize("place", ["left", "right", "top", "bottom"])
def test_an_object_lies_on_its_side_and_has_its_colour(place: str) -> None:
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[place]
    for seed, (colour, shape) in enumerate(product(("red", "green", "blue"), SHAPES)):
        thing = SceneObject(shape, colour, "large", place)
        scene = Scene("white", (thing, SceneObject("square", "yellow", "small", opposite)))
        ys, xs = np.nonzero(_near(_pixels(scene, seed), COLOURS[colour]))
        x_from, x_to, y_from, y_to = CORNERS[place]
        assert len(xs) > 100
        assert x_from <= xs.min() <= xs.max() < x_to
        assert y_from <= ys.min() <= ys.max() < y_to


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "ring"])
@pytest.mark.parametrize("colour", COLOURS)
def test_the_middle_of_an_object_has_its_colour_and_the_corner_the_background(shape: str, colour: str) -> None:
    for background in BACKGROUNDS:
        pixels = _pixels(Scene(background, (SceneObject(shape, colour, "large", "middle"),)))
        # The object is where the picture differs most from its corner; its place varies a little.
        ys, xs = np.nonzero(np.abs(pixels - pixels[:4, :4].mean(axis=(0, 1))).max(axis=-1) > 60)
        middle = pixels[round(ys.mean()) - 1 : round(ys.mean()) + 2, round(xs.mean()) - 1 : round(xs.mean()) + 2]
        assert np.abs(middle.mean(axis=(0, 1)) - COLOURS[colour]).max() < 30
        assert np.abs(pixels[:6, :6].mean(axis=(0, 1)) - BACKGROUNDS[background]).max() < 20


def test_a_ring_has_a_hole_of_the_background() -> None:
    pixels = _pixels(Scene("black", (SceneObject("ring", "red", "large", "middle"),)))
    ys, xs = np.nonzero(_near(pixels, COLOURS["red"]))
    hole = pixels[round(ys.mean()), round(xs.mean())]
    assert np.abs(hole - BACKGROUNDS["black"]).max() < 45


def test_large_is_well_apart_from_small() -> None:
    def areas(size: str) -> list[int]:
        scenes = (Scene("white", (SceneObject("square", "blue", size, "middle"),)) for _ in range(20))
        return [int(_near(_pixels(scene, seed), COLOURS["blue"]).sum()) for seed, scene in enumerate(scenes)]

    assert min(areas("large")) > 2 * max(areas("small"))


def test_colours_lie_far_apart() -> None:
    values = [np.array(value, dtype=np.float64) for value in (*COLOURS.values(), *BACKGROUNDS.values())]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(values) for b in values[:i]]
    assert min(distances) > 85


def test_the_same_generator_state_gives_the_same_bytes_and_another_state_others() -> None:
    scene = draw_scene(np.random.default_rng(1))
    first, again, other = (render_scene(scene, np.random.default_rng([7, seed])) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_picture_has_the_size_that_was_asked_for() -> None:
    assert _pixels(draw_scene(np.random.default_rng(1)), size=96).shape == (96, 96, 3)
