"""The grammar's verdicts against cases written by hand, and its captions against their scenes."""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

from blip_core import scenes
from blip_core.errors import ConfigError
from blip_core.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    SHAPES,
    SIZES,
    TEMPLATES,
    Scene,
    captions_of,
    draw_scene,
    is_right,
    read_caption,
)
from blip_core.scenes.junk import draw_junk

WORDS = {
    "frame": FRAMES,
    "background": tuple(BACKGROUNDS),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
}
"""The words that each property of a scene may take."""
SCENE = Scene(**{name: words[0] for name, words in WORDS.items()})
TRUE = {name: words[0] for name, words in WORDS.items()}
FALSE = {f"not_{name}": words[1] for name, words in WORDS.items()}


def say(text: str) -> str:
    """The text with the words of SCENE in it, and words that are false of it where it says `not_`."""
    return text.format(**TRUE, **FALSE)


@pytest.mark.parametrize(
    "text",
    [
        "a {size} {colour} {shape} on a {background} background in a {frame} frame",
        "in a {frame} frame a {size} {colour} {shape} on a {background} background",
        "a {frame} frame and a {size} {colour} {shape} on a {background} background",
        "  A {size} {colour} {shape},  on\ta {background} background in a {frame} frame. ",
        "In a {frame} frame: a {size}, {colour} {shape} on a {background} background!",
    ],
)
def test_a_caption_that_tells_the_scene_is_right(text: str) -> None:
    assert is_right(say(text), SCENE)
    assert is_right(say(text).upper(), SCENE)
    assert is_right(say(text), SCENE.to_json())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("wrong", WORDS)
def test_a_single_false_claim_makes_a_caption_wrong(template: str, wrong: str) -> None:
    parts = {"object": "a {size} {colour} {shape}", "background": "{background}", "frame": "{frame}"}
    text = template.format(**parts).replace(f"{{{wrong}}}", f"{{not_{wrong}}}")
    assert read_caption(say(text)) is not None
    assert not is_right(say(text), SCENE)
    assert not is_right(say(text), SCENE.to_json())


@pytest.mark.parametrize(
    "text",
    [
        "a {colour} {shape} on a {background} background in a {frame} frame",  # no size
        "a {size} {shape} on a {background} background in a {frame} frame",  # no colour
        "a {size} {colour} on a {background} background in a {frame} frame",  # no shape
        "a {size} {colour} {shape} on a background in a {frame} frame",  # no background
        "a {size} {colour} {shape} in a {frame} frame",
        "a {size} {colour} {shape} on a {background} background",  # no frame
        "a {size} {colour} {shape} on a {background} background in a frame",
        "a {size} {colour} {shape}",
        "{shape}",
        "a {background} background",
        "a {frame} frame",
        "in a {frame} frame a {size} {colour} {shape} on a {background}",
        "{size} {colour} {shape} on a {background} background in a {frame} frame",
    ],
)
def test_a_caption_that_tells_only_a_part_is_wrong_though_nothing_in_it_is_false(text: str) -> None:
    assert not is_right(say(text), SCENE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "...",
        "IMG_2034.JPG",
        "a {colour} {size} {shape} on a {background} background in a {frame} frame",  # order of words
        "a {size} {colour} {shape} on the {background} background in a {frame} frame",
        "the {size} {colour} {shape} on a {background} background in a {frame} frame",
        "a {size} {colour} {shape} on on a {background} background in a {frame} frame",
        "a {size} {colour} {shape} and a {size} {colour} {shape} on a {background} background in a {frame} frame",
        "a {size} {colour} {shape} on a {background} background in a {frame} frame clipart free download",
        "buy a {size} {colour} {shape} on a {background} background in a {frame} frame",
        "a {size} {colour} {shape}s on a {background} background in a {frame} frame",
        "a {size} {colour}ish {shape} on a {background} background in a {frame} frame",
        "a {size} ultraviolet {shape} on a {background} background in a {frame} frame",
        "a {size} {colour} hexagon on a {background} background in a {frame} frame",
        "a {size} {colour} {shape} on a {background} background in a {frame} frame in a {frame} frame",
    ],
)
def test_text_that_is_no_caption_of_the_grammar_is_wrong(text: str) -> None:
    assert read_caption(say(text)) is None
    assert not is_right(say(text), SCENE)


def test_every_caption_of_every_scene_is_right_for_that_scene_alone() -> None:
    rng = np.random.default_rng(2)
    told: dict[str, Scene] = {}
    for words in product(*WORDS.values()):
        scene = Scene(**dict(zip(WORDS, words, strict=True)))
        captions = captions_of(scene, rng, len(TEMPLATES))
        assert len(set(captions)) == len(TEMPLATES)
        assert not told.keys() & set(captions)
        told |= dict.fromkeys(captions, scene)
        for caption in captions:
            assert read_caption(caption) == scene, caption
    for caption, scene in list(told.items())[::7]:
        others = [replace(scene, **{name: word}) for name, words in WORDS.items() for word in words]
        assert {other for other in others if is_right(caption, other)} == {scene}


def test_every_scene_is_drawn_and_each_word_equally_often() -> None:
    rng = np.random.default_rng(3)
    all_scenes = int(np.prod([len(words) for words in WORDS.values()]))
    draws = [draw_scene(rng) for _ in range(20 * all_scenes)]
    assert len(set(draws)) == all_scenes
    for name, words in WORDS.items():
        counts = Counter(getattr(scene, name) for scene in draws)
        share = 1 / len(words)
        deviation = (len(draws) * share * (1 - share)) ** 0.5
        assert counts.keys() == set(words)
        assert all(abs(count - len(draws) * share) < 4 * deviation for count in counts.values()), (name, counts)


def test_scenes_survive_json() -> None:
    rng = np.random.default_rng(4)
    for scene in (draw_scene(rng) for _ in range(50)):
        assert Scene.from_json(scene.to_json()) == scene
        assert all(isinstance(word, str) for word in scene.to_json().values())


def test_each_form_is_used_and_the_generator_alone_decides_which() -> None:
    rng = np.random.default_rng(5)
    captions = Counter(captions_of(SCENE, rng, 1)[0] for _ in range(300))
    assert len(captions) == len(TEMPLATES)
    assert min(captions.values()) > 200 / len(TEMPLATES)
    first, again = (captions_of(SCENE, np.random.default_rng(6), len(TEMPLATES)) for _ in range(2))
    assert first == again


def test_captions_fit_the_demos_model_untruncated() -> None:
    demo = yaml.safe_load(Path(scenes.__file__).with_name("demo.yaml").read_text())
    rng = np.random.default_rng(7)
    captions = [captions_of(draw_scene(rng), rng, 1)[0].split() for _ in range(500)]
    longest = max(map(len, captions))
    assert longest + 2 <= demo["tokenizer"]["max_tokens"]  # [CLS] and [SEP]
    assert longest <= min(demo["generation"]["max_length"], demo["evaluation"]["max_length"])
    assert len({word for caption in captions for word in caption}) < 60


def test_junk_is_no_caption() -> None:
    rng = np.random.default_rng(8)
    texts = {draw_junk(rng) for _ in range(500)}
    assert len(texts) > 200
    assert [text for text in texts if read_caption(text) is not None] == []


def test_more_captions_than_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"captions: {len(TEMPLATES) + 1} asked for"):
        captions_of(SCENE, np.random.default_rng(0), len(TEMPLATES) + 1)
