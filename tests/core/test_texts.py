"""What is taken of a stranger's text, against Unicode's own tables, and for every text there can be."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip_core.med.tokenizer import clean_caption
from blip_core.texts import MAX_CHARACTERS, candidate_text, clean_text

ANY = st.text(st.characters(codec=None), max_size=300)
# Bidi_Class of the controls that set a direction for what follows (UAX 9).
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS_OF_DIRECTION = "\u200e\u200f\u061c"
ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e\u034f\u3164\ufe0f\U000e0041"


def test_every_character_of_unicode_is_kept_replaced_or_taken_away_as_its_class_says() -> None:
    wrong = []
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        category, direction = unicodedata.category(character), unicodedata.bidirectional(character)
        left = clean_text(f"a{character}b")
        if category in ("Cc", "Zl", "Zp"):
            expected = "a b" if character.isspace() else "ab"
        elif category == "Cs" or direction in DIRECTIONS or character in MARKS_OF_DIRECTION + ZERO_WIDTH:
            expected = "ab"
        elif category[0] in "LNPZ" and category != "Lo":  # fillers are Lo, and taken away
            expected = f"a{character}b"
        else:
            continue
        if left != expected:
            wrong.append(f"{number:x}")
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "a red bus",
        "Ein Hüttchen, 5 × 3 m²",
        "日本語の写真",
        "תמונה של כלב",
        "صورة كلب",
        "हिन्दी में",
        "🙂🚌",
        "naïve e\u0301",
    ],
)
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert clean_text(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a\u202egod\u202c cat", "agod cat"),
        ("in\u200bvis\u2060ible", "invisible"),
        ("two\nlines\tand\x0bmore", "two lines and more"),
        ("bell\x07\x1b[31mred", "bell[31mred"),
        ("tag\U000e0068\U000e0069ged", "tagged"),
        ("\ufeffa bus", "a bus"),
        ("\u200b\u202e\x00", ""),
    ],
)
def test_what_cannot_be_seen_is_taken_away(text: str, left: str) -> None:
    assert clean_text(text) == left


@given(ANY)
def test_cleaning_never_fails_adds_nothing_and_is_done_after_once(text: str) -> None:
    left = clean_text(text)
    assert clean_text(left) == left
    assert left.encode().decode() == left
    assert len(left) <= len(text)
    assert set(left) <= {*text, " "}


@given(ANY)
def test_what_a_model_reads_is_the_same_of_a_text_and_of_its_candidate(text: str) -> None:
    assert clean_caption(text) == clean_caption(candidate_text(text).text)
    assert len(clean_caption(text).split()) <= 30


def test_a_text_that_is_too_long_for_a_caption_says_so_and_only_its_beginning_is_taken() -> None:
    longest = "x" * MAX_CHARACTERS
    assert candidate_text(longest) == (longest, False)
    assert candidate_text(longest + "y") == (longest, True)
    assert candidate_text("\u200b" * (MAX_CHARACTERS + 1)) == ("", True)
    assert candidate_text(None) == ("", False)
    assert len(clean_caption("word" * 10**6)) == MAX_CHARACTERS
