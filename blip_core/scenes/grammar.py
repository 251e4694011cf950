"""What a scene shows and how it is told: the constants below are the whole of the world.

A scene is one object in the middle, or two objects side by side or one above the other. `captions_of` tells
a scene in words; `is_right` reads any text back and checks each claim, without knowing who wrote it. Every
template tells how many objects there are, so that no caption is true of a scene only because it says little.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import permutations
from typing import Any, Self

import numpy as np

from blip_core.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
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
LAYOUTS = (("middle",), ("left", "right"), ("top", "bottom"))
LAYOUT_SHARES = (0.2, 0.4, 0.4)
SIZED_SHARE = 0.5
"""The share of captions that tell the sizes of the objects."""


@dataclass(frozen=True)
class Template:
    """A form of caption: its words, and for each object it names, the place that the words claim (None: no claim)."""

    words: str
    places: tuple[str | None, ...]


TEMPLATES = (
    Template("just {0}", (None,)),
    Template("just {0} on a {background} background", (None,)),
    Template("{0} in the middle", ("middle",)),
    Template("{0} and {1}", (None, None)),
    Template("{0} and {1} on a {background} background", (None, None)),
    Template("{0} on the left and {1} on the right", ("left", "right")),
    Template("{0} left of {1}", ("left", "right")),
    Template("{0} right of {1}", ("right", "left")),
    Template("{0} at the top and {1} at the bottom", ("top", "bottom")),
    Template("{0} above {1}", ("top", "bottom")),
    Template("{0} below {1}", ("bottom", "top")),
)


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene, each property a word of the grammar."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a background and one or two objects, in the order of their layout's places."""

    background: str
    objects: tuple[SceneObject, ...]

    def to_json(self) -> dict[str, Any]:
        """The scene as plain JSON values, for the truth table."""
        return {"background": self.background, "objects": [asdict(thing) for thing in self.objects]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The scene that `to_json` wrote."""
        return cls(value["background"], tuple(SceneObject(**thing) for thing in value["objects"]))


@dataclass(frozen=True)
class ObjectClaim:
    """What a text says of one object; None where it says nothing."""

    shape: str
    colour: str
    size: str | None
    place: str | None

    def holds(self, thing: SceneObject) -> bool:
        """Whether everything claimed is true of the object."""
        return (
            self.shape == thing.shape
            and self.colour == thing.colour
            and self.size in (None, thing.size)
            and self.place in (None, thing.place)
        )


@dataclass(frozen=True)
class Claims:
    """What a caption says of a scene: its background (None: nothing said) and all of its objects."""

    background: str | None
    objects: tuple[ObjectClaim, ...]

    def hold(self, scene: Scene) -> bool:
        """Whether everything claimed is true of the scene, in whatever order its objects are named."""
        if self.background not in (None, scene.background) or len(self.objects) != len(scene.objects):
            return False
        return any(
            all(claim.holds(thing) for claim, thing in zip(self.objects, order, strict=True))
            for order in permutations(scene.objects)
        )


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene; its objects differ in colour or shape."""
    layout = LAYOUTS[rng.choice(len(LAYOUTS), p=LAYOUT_SHARES)]
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    chosen = rng.choice(len(kinds), size=len(layout), replace=False)
    objects = tuple(
        SceneObject(shape, colour, SIZES[rng.integers(len(SIZES))], place)
        for (shape, colour), place in zip((kinds[kind] for kind in chosen), layout, strict=True)
    )
    return Scene(tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], objects)


def captions_of(scene: Scene, rng: np.random.Generator, n: int) -> list[str]:
    """n right captions of the scene, each in another form. Raises ConfigError where the grammar has fewer forms."""
    places = [thing.place for thing in scene.objects]
    fitting = [t for t in TEMPLATES if len(t.places) == len(places) and {*t.places} <= {None, *places}]
    if n > len(fitting):
        raise ConfigError(f"captions: {n} asked for, but the grammar has {len(fitting)} forms for such a scene")
    return [_tell(scene, fitting[index], rng) for index in rng.permutation(len(fitting))[:n]]


def _tell(scene: Scene, template: Template, rng: np.random.Generator) -> str:
    shuffled = [scene.objects[index] for index in rng.permutation(len(scene.objects))]
    ordered = [
        next(thing for thing in scene.objects if thing.place == place) if place else shuffled[position]
        for position, place in enumerate(template.places)
    ]
    sized = rng.random() < SIZED_SHARE
    return template.words.format(*(_noun_phrase(thing, sized) for thing in ordered), background=scene.background)


def _noun_phrase(thing: SceneObject, sized: bool) -> str:
    words = f"{thing.size} {thing.colour} {thing.shape}" if sized else f"{thing.colour} {thing.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def read_caption(text: str) -> Claims | None:
    """The claims of a text; None where it is no caption of the grammar. Case, punctuation and spacing do not matter."""
    words = " ".join(re.sub(r"[^\w\s]|_", " ", text.lower()).split())
    for template, pattern in _patterns():
        if found := pattern.fullmatch(words):
            parts = found.groupdict()
            objects = tuple(
                ObjectClaim(parts[f"shape{i}"], parts[f"colour{i}"], parts[f"size{i}"], place)
                for i, place in enumerate(template.places)
            )
            return Claims(parts.get("background"), objects)
    return None


@cache
def _patterns() -> tuple[tuple[Template, re.Pattern[str]], ...]:
    noun_phrases = [
        rf"an? (?:(?P<size{i}>{'|'.join(SIZES)}) )?(?P<colour{i}>{'|'.join(COLOURS)}) (?P<shape{i}>{'|'.join(SHAPES)})"
        for i in range(2)
    ]
    background = rf"(?P<background>{'|'.join(BACKGROUNDS)})"
    return tuple((t, re.compile(t.words.format(*noun_phrases, background=background))) for t in TEMPLATES)


def is_right(text: str, scene: Scene | Mapping[str, Any]) -> bool:
    """Whether the text is a caption of the grammar and everything it claims is true of the scene.

    `scene` is a Scene or what its `to_json` gave. Junk, and text that is not of the grammar, is wrong.
    """
    claims = read_caption(text)
    return claims is not None and claims.hold(scene if isinstance(scene, Scene) else Scene.from_json(scene))
