"""Pictures that travel inside a page: the sheet of cards, and charts as pictures."""

import base64
import io
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from blip_core.evaluation.charts import loss_curve, score_histogram
from blip_core.evaluation.pictures import CARD_GAP, CARD_HEIGHT, NOT_XML, sheet

HTML = "{http://www.w3.org/1999/xhtml}"


def row(text: str = "a red circle", source: str = "web") -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(data, "JPEG")
    return {"uid": "u", "text": text, "source": source, "itm_score": 0.98765, "image": data.getvalue()}


def drawn(rows: list[dict[str, Any]]) -> ElementTree.Element:
    head, _, data = sheet(rows).partition(",")
    assert head == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(data))


def texts(picture: ElementTree.Element) -> list[str]:
    return [str(element.text or "") for element in picture.iter(f"{HTML}div") if element.get("class") == "text"]


def test_every_row_is_a_card_with_picture_text_source_and_score() -> None:
    picture = drawn([row(), row("a blue square", "synthetic")])
    assert texts(picture) == ["a red circle", "a blue square"]
    assert [element.text for element in picture.iter(f"{HTML}span")] == ["web", "0.988", "synthetic", "0.988"]
    for image in picture.iter(f"{HTML}img"):
        data = image.get("src", "").removeprefix("data:image/jpeg;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 30)


@pytest.mark.parametrize(("count", "lines"), [(1, 1), (4, 1), (5, 2), (12, 3)])
def test_the_sheet_is_as_high_as_its_lines_of_four(count: int, lines: int) -> None:
    assert int(drawn([row()] * count).get("height", "")) == lines * CARD_HEIGHT + (lines - 1) * CARD_GAP + 2


@given(st.text())
def test_a_text_from_the_web_is_shown_and_is_never_markup(text: str) -> None:
    hostile = f"<img src='http://198.51.100.1/x'/>]]>&lt;{text}"
    picture = drawn([row(hostile)])
    shown = NOT_XML.sub(" ", hostile).replace("\r\n", "\n").replace("\r", "\n")
    assert texts(picture) == [shown]
    assert len(list(picture.iter(f"{HTML}img"))) == 1


def test_charts_are_whole_pictures_too() -> None:
    curve = [{"step": step, "itc": 1 / step, "itm": None, "lm": None} for step in (1, 2, 3)]
    for picture in (loss_curve("med", curve), score_histogram({"web": [3, 0, 1]}, "picture")):
        image = Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/png;base64,"))))
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert len(image.convert("RGB").getcolors(1_000_000) or []) > 20  # something is drawn
    assert loss_curve("med", curve) == loss_curve("med", curve)
    assert loss_curve("med", curve) != loss_curve("filter", curve)
