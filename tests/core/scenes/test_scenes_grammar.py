"""The grammar's verdicts against cases written by hand, and its captions against their scenes."""

import numpy as np
import pytest

from blip_core.errors import ConfigError
from blip_core.scenes.grammar import COLOURS, SHAPES, TEMPLATES, Scene, SceneObject, captions_of, draw_scene, is_right

ROW = {
    "background": "gray",
    "objects": [
        {"shape": "circle", "colour": "red", "size": "large", "place": "left"},
        {"shape": "square", "colour": "blue", "size": "small", "place": "right"},
    ],
}
COLUMN = {
    "background": "black",
    "objects": [
        {"shape": "star", "colour": "orange", "size": "small", "place": "top"},
        {"shape": "ring", "colour": "orange", "size": "small", "place": "bottom"},
    ],
}
SINGLE = {
    "background": "white",
    "objects": [{"shape": "cross", "colour": "pink", "size": "small", "place": "middle"}],
}


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a red circle and a blue square", ROW),
        ("a blue square and a red circle", ROW),
        ("a large red circle and a small blue square", ROW),
        ("a small blue square and a red circle on a gray background", ROW),
        ("a red circle on the left and a blue square on the right", ROW),
        ("a red circle left of a small blue square", ROW),
        ("a blue square right of a red circle", ROW),
        ("  A Red CIRCLE,  and a blue\tsquare. ", ROW),
        ("an orange star above an orange ring", COLUMN),
        ("a orange ring below a small orange star", COLUMN),
        ("a small orange star at the top and a small orange ring at the bottom", COLUMN),
        ("just a pink cross", SINGLE),
        ("just a small pink cross on a white background", SINGLE),
        ("a pink cross in the middle!", SINGLE),
    ],
)
def test_true_captions_are_right(text: str, scene: dict) -> None:
    assert is_right(text, scene)
    assert is_right(text, Scene.from_json(scene))


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a green circle and a blue square", ROW),  # wrong colour
        ("a red circle and a blue star", ROW),  # wrong shape
        ("a blue circle and a red square", ROW),  # colours swapped
        ("a small red circle and a blue square", ROW),  # wrong size
        ("a small red circle and a large blue square", ROW),  # sizes swapped
        ("a red circle and a blue square on a white background", ROW),  # wrong background
        ("a blue square on the left and a red circle on the right", ROW),  # places swapped
        ("a red circle right of a blue square", ROW),
        ("a blue square left of a red circle", ROW),
        ("a red circle above a blue square", ROW),  # the other axis
        ("a red circle at the top and a blue square at the bottom", ROW),
        ("a red circle and a red circle", ROW),  # one object named twice
        ("a red circle and a green star", ROW),  # half right
        ("just a red circle", ROW),  # there is another object
        ("a red circle in the middle", ROW),
        ("an orange ring above an orange star", COLUMN),
        ("an orange star below an orange ring", COLUMN),
        ("an orange star left of an orange ring", COLUMN),
        ("a large orange star above an orange ring", COLUMN),
        ("a pink cross and a pink ring", SINGLE),  # an object that is not there
        ("just a large pink cross", SINGLE),
        ("just a pink cross on a black background", SINGLE),
    ],
)
def test_a_single_false_claim_makes_a_text_wrong(text: str, scene: dict) -> None:
    assert not is_right(text, scene)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "IMG_2034.JPG",
        "red circle",
        "a red circle",
        "a red circle and",
        "a red circle and a blue",
        "a red circle a blue square",
        "a circle and a square",
        "red circle and blue square",
        "a red large circle and a blue square",
        "a red circle and a blue square and a blue square",
        "a red circle and a blue square clipart free download",
        "buy a red circle and a blue square",
        "a red circle on the left and a blue square",
        "a red circle and a blue square on the gray background",
        "a red circle and a blue square on a background",
        "a_red_circle_and_a_blue_squares",
    ],
)
def test_text_that_is_no_caption_of_the_grammar_is_wrong(text: str) -> None:
    assert not is_right(text, ROW)


def test_objects_of_one_kind_are_told_apart_by_what_is_claimed_of_them() -> None:
    twins = Scene(
        "gray", (SceneObject("circle", "red", "small", "left"), SceneObject("circle", "red", "large", "right"))
    )
    assert is_right("a large red circle and a small red circle", twins)
    assert is_right("a small red circle left of a large red circle", twins)
    assert not is_right("a large red circle and a large red circle", twins)
    assert not is_right("a large red circle left of a small red circle", twins)


def test_drawn_scenes_tell_only_truths_and_survive_json() -> None:
    rng = np.random.default_rng(3)
    words: set[str] = set()
    longest = 0
    for _ in range(400):
        scene = draw_scene(rng)
        assert Scene.from_json(scene.to_json()) == scene
        captions = captions_of(scene, rng, 3)
        assert len(set(captions)) == 3
        assert all(is_right(caption, scene) for caption in captions)
        words.update(*(caption.split() for caption in captions))
        longest = max(longest, *(len(caption.split()) for caption in captions))
    assert {*SHAPES, *COLOURS, "just", "above", "below", "left", "right"} <= words
    assert len(words) < 60
    assert longest <= 15


def test_each_template_is_used_and_sizes_are_told_in_about_half_the_captions() -> None:
    rng = np.random.default_rng(4)
    captions = [captions_of(draw_scene(rng), rng, 1)[0] for _ in range(600)]
    for template in TEMPLATES:
        inner = template.words.replace("{background}", "").replace("{0}", "").replace("{1}", "").split()
        assert any(all(word in caption.split() for word in inner) for caption in captions), template
    sized = sum(" small " in caption or " large " in caption for caption in captions)
    assert 0.42 < sized / len(captions) < 0.58


def test_the_objects_of_a_scene_differ_in_colour_or_shape() -> None:
    rng = np.random.default_rng(5)
    for scene in (draw_scene(rng) for _ in range(500)):
        kinds = [(thing.shape, thing.colour) for thing in scene.objects]
        assert len(set(kinds)) == len(kinds)


def test_more_captions_than_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="captions: 4 asked for"):
        captions_of(Scene.from_json(SINGLE), np.random.default_rng(0), 4)
