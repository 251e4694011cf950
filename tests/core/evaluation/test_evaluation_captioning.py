"""BLEU-4 and CIDEr against values worked out by hand."""

import math

import pytest

from blip_core.evaluation.captioning import caption_scores

TEXTS = ["a small red circle left of a ring", "two dogs run over green grass", "an old man reads his paper"]


def test_captions_that_are_their_references_score_one_and_ten() -> None:
    scores = caption_scores(TEXTS, [[text] for text in TEXTS])
    assert scores["bleu4"] == pytest.approx(1.0, abs=1e-6)
    assert scores["cider"] == pytest.approx(10.0, abs=1e-6)


def test_captions_that_share_no_word_with_their_references_score_zero() -> None:
    scores = caption_scores(["x y z v w"] * 3, [[text] for text in TEXTS])
    assert scores["bleu4"] == pytest.approx(0.0, abs=1e-3)
    assert scores["cider"] == pytest.approx(0.0, abs=1e-9)


def test_bleu_of_one_changed_word_is_the_hand_computed_geometric_mean() -> None:
    # of 6 words, 5 are right; so are 4 of 5 pairs, 3 of 4 triples and 2 of 3 quadruples; the lengths are equal
    scores = caption_scores(["the cat sat on the sofa"], [["the cat sat on the mat"]])
    assert scores["bleu4"] == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25, abs=1e-6)


def test_bleu_of_a_short_caption_pays_the_brevity_penalty() -> None:
    scores = caption_scores(["the cat sat on"], [["the cat sat on the mat"]])
    assert scores["bleu4"] == pytest.approx(math.exp(1 - 6 / 4), abs=1e-6)


def test_cider_of_two_images_is_the_hand_computed_mean_of_cosines() -> None:
    # Image 1: caption 'red dog', reference 'red cat'. 'red' is in both images' references, so it weighs log(2/2) = 0
    # and 'cat' log 2; 'dog' is in none, and weighs log 2 too; nothing that weighs is shared: 0.
    # Image 2: caption and reference are both 'red owl': 1-grams and 2-grams agree, there are no longer ones: 10 * 2/4.
    scores = caption_scores(["red dog", "red owl"], [["red cat"], ["red owl"]])
    assert scores["cider"] == pytest.approx((0 + 5) / 2, abs=1e-6)


def test_case_and_punctuation_do_not_count() -> None:
    plain = caption_scores(["a red ring, on a table."], [["A red ring on a table!", "a cat"]])
    assert plain["bleu4"] == pytest.approx(1.0, abs=1e-6)


def test_empty_caption_is_scored_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    scores = caption_scores(["", TEXTS[1]], [[TEXTS[0]], [TEXTS[1]]])
    assert 0 < scores["bleu4"] < 1
    assert scores["cider"] == pytest.approx(5.0)
    assert capsys.readouterr() == ("", "")
