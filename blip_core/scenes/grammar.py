"""What a scene shows and how it is told: the constants below are the whole of the world.

A scene is one object on a background, in a frame. `captions_of` tells it in words; `is_right` reads any text back
and checks each claim, without knowing who wrote it. Every caption tells everything, so that none is true of a scene
only because it says little. The world is as small as it is so that a small model learns it in minutes on a CPU.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Self

import numpy as np

from blip_core.errors import ConfigError

SHAPES = ("square", "cross", "ring")
COLOURS = {
    "red": (214, 24, 32),
    "orange": (255, 134, 0),
    "yellow": (248, 226, 28),
    "green": (16, 140, 40),
    "cyan": (0, 208, 216),
    "blue": (24, 48, 214),
    "purple": (120, 24, 160),
    "pink": (255, 130, 200),
}
BACKGROUNDS = {"white": (246, 246, 246), "gray": (136, 136, 136), "black": (12, 12, 12)}
SIZES = ("small", "large")
FRAMES = tuple(COLOURS)
"""The colour of the picture's frame. It makes the world large enough that a batch seldom holds a scene twice."""
TEMPLATES = (
    "{object} on a {background} background in a {frame} frame",
    "in a {frame} frame {object} on a {background} background",
    "a {frame} frame and {object} on a {background} background",
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows, each property a word of the grammar. Where the object lies is not told."""

    frame: str
    background: str
    shape: str
    colour: str
    size: str

    def to_json(self) -> dict[str, str]:
        """The scene as plain JSON values, for the truth table."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The scene that `to_json` wrote."""
        return cls(**value)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene, every one equally likely."""
    choices = (FRAMES, tuple(BACKGROUNDS), SHAPES, tuple(COLOURS), SIZES)
    return Scene(*(words[rng.integers(len(words))] for words in choices))


def captions_of(scene: Scene, rng: np.random.Generator, n: int) -> list[str]:
    """n right captions of the scene, each in another form. Raises ConfigError where the grammar has fewer forms."""
    if n > len(TEMPLATES):
        raise ConfigError(f"captions: {n} asked for, but the grammar has {len(TEMPLATES)} forms")
    words = {
        "object": f"a {scene.size} {scene.colour} {scene.shape}",
        "background": scene.background,
        "frame": scene.frame,
    }
    return [TEMPLATES[index].format(**words) for index in rng.permutation(len(TEMPLATES))[:n]]


def read_caption(text: str) -> Scene | None:
    """The scene that a text tells; None where it is no caption of the grammar.

    Case, punctuation and spacing do not matter.
    """
    words = " ".join(re.sub(r"[^\w\s]|_", " ", text.lower()).split())
    for pattern in _patterns():
        if found := pattern.fullmatch(words):
            return Scene(**found.groupdict())
    return None


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    def any_of(name: str, words: Any) -> str:
        return rf"(?P<{name}>{'|'.join(words)})"

    parts = {
        "object": f"a {any_of('size', SIZES)} {any_of('colour', COLOURS)} {any_of('shape', SHAPES)}",
        "background": any_of("background", BACKGROUNDS),
        "frame": any_of("frame", FRAMES),
    }
    return tuple(re.compile(template.format(**parts)) for template in TEMPLATES)


def is_right(text: str, scene: Scene | Mapping[str, Any]) -> bool:
    """Whether the text is a caption of the grammar and everything it claims is true of the scene.

    `scene` is a Scene or what its `to_json` gave. Junk, and text that is not of the grammar, is wrong.
    """
    told = read_caption(text)
    return told is not None and told == (scene if isinstance(scene, Scene) else Scene.from_json(scene))
