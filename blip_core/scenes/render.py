"""Draws a scene as a small JPEG, as a pure function of (scene, random generator).

Shapes are drawn at four times the size and averaged down, so that edges are smooth. Place, size and colour
vary a little and the picture has noise, so that no two pictures of one scene are alike.
"""

import io

import numpy as np
from PIL import Image, ImageDraw

from blip_core.scenes.grammar import BACKGROUNDS, COLOURS, Scene

RADII = {"small": (0.15, 0.18), "large": (0.3, 0.33)}
"""The range of an object's radius, in shares of the picture's side."""
FRAME = 0.11
"""The width of the frame, in shares of the picture's side."""
STRAY = 0.03
"""How far an object may stray from the middle, in each direction."""
COLOUR_SHIFT = 10
NOISE = 5.0
"""Standard deviation of the noise, in levels of 0..255."""
JPEG_QUALITY = 90
SUPERSAMPLING = 4


def render_scene(scene: Scene, rng: np.random.Generator, size: int = 64) -> bytes:
    """The scene as the bytes of an RGB JPEG of size x size pixels."""
    side = size * SUPERSAMPLING
    ground = _shifted(BACKGROUNDS[scene.background], rng)
    picture = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, side, side), outline=_shifted(COLOURS[scene.frame], rng), width=round(FRAME * side))
    x, y, radius = _position(scene, rng)
    _draw_shape(draw, scene.shape, x * side, y * side, radius * side, _shifted(COLOURS[scene.colour], rng), ground)
    pixels = np.asarray(picture.reduce(SUPERSAMPLING), dtype=np.float64)  # (size, size, 3)
    noisy = np.clip(np.rint(pixels + rng.normal(0.0, NOISE, pixels.shape)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    # At this size, halving the colours' resolution would wash the small shapes out.
    Image.fromarray(noisy).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _shifted(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(colour) + rng.integers(-COLOUR_SHIFT, COLOUR_SHIFT + 1, 3), 0, 255).tolist()
    return red, green, blue


def _position(scene: Scene, rng: np.random.Generator) -> tuple[float, float, float]:
    """Centre x, y and radius, in shares of the picture's side; the object stays whole."""
    x, y = rng.uniform(0.5 - STRAY, 0.5 + STRAY, 2)
    return float(x), float(y), float(rng.uniform(*RADII[scene.size]))


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    radius: float,
    colour: tuple[int, int, int],
    ground: tuple[int, int, int],
) -> None:
    """Draws a shape of the given colour with its middle at (x, y); `ground` fills the hole of a ring."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "ring":
        draw.ellipse(box, fill=colour)
        hole = 0.6 * radius
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
    elif shape == "square":
        half = 0.88 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "cross":
        bar = 0.25 * radius
        draw.rectangle((x - radius, y - bar, x + radius, y + bar), fill=colour)
        draw.rectangle((x - bar, y - radius, x + bar, y + radius), fill=colour)
