"""The audit's page as a file: texts are text, nothing comes from elsewhere, and nothing says what the Filter thinks."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from services.rounds import make_round

from blip_core.errors import WorkspaceError
from blip_core.evaluation.audit_page import MOST_CHARACTERS, write_page
from blip_core.evaluation.sample import draw_sample

HOSTILE = [
    "</p></article></main><script>document.title = 'owned'</script>",
    "<img src=http://evil.test/x.png onerror=\"document.title='owned'\">",
    "{{ 7 * 7 }}{% raw %} \" onfocus=alert(1) autofocus x='",
    "‮right to left⁦ and \u200bnothing\u0000\u0007 \ufeff",
    "a\n\nb\t<style>body{display:none}</style>",
    "x" * (MOST_CHARACTERS + 500),
]


class Page(HTMLParser):
    """Tags with attributes, and the content of each paragraph of class `text`, script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, list[str]] = {"text": [], "script": [], "style": []}
        self.inside: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = tag if tag in self.content else dict(attributes).get("class")
        if self.inside in self.content:
            self.content[self.inside].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside in self.content:
            self.content[self.inside][-1] += data


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Page, list[str]]:
    """The page of a round whose texts mean harm, and the texts in the order of the page."""
    workspace = make_round(tmp_path / "workspace", HOSTILE)
    sample = draw_sample(workspace, 1)
    return Page(write_page(workspace, sample).read_text(encoding="utf-8")), [pair.text for pair in sample.drawn]


def test_a_text_is_shown_as_text_and_a_long_one_is_cut(hostile: tuple[Page, list[str]]) -> None:
    page, texts = hostile
    assert sorted(texts) == sorted(HOSTILE)
    assert page.content["text"] == [text[:MOST_CHARACTERS] for text in texts]


def test_nothing_but_the_pages_own_script_and_style_runs_and_nothing_is_asked_for(
    hostile: tuple[Page, list[str]],
) -> None:
    page, _ = hostile
    policies = [given["content"] for tag, given in page.tags if given.get("http-equiv") == "Content-Security-Policy"]
    (policy,) = policies
    for kind in ("script", "style"):
        (content,) = page.content[kind]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy)
    assert "unsafe" not in str(policy)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "embed", "base", "form", "a", "input"})
    for tag, given in page.tags:
        assert not any(name.startswith("on") or name in ("style", "href", "srcset") for name in given), (tag, given)
        assert str(given.get("src", "data:image/jpeg;base64,")).startswith("data:image/jpeg;base64,")
    assert not re.search(r"url\(|@import|https?:", page.content["script"][0] + page.content["style"][0])


def test_each_pair_has_its_own_picture_and_none_says_what_the_filter_thinks(finished: Any) -> None:
    sample = draw_sample(finished.workspace, 1, 30)
    html = write_page(finished.workspace, sample).read_text(encoding="utf-8")
    page = Page(html)
    pictures = [str(given["src"]) for tag, given in page.tags if tag == "img"]
    assert len(pictures) == len(page.content["text"]) == 30
    for source, pair in zip(pictures, sample.drawn, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert picture.size == (96, 72)
            red, green, blue = picture.convert("RGB").getpixel((48, 36))  # type: ignore[misc]
        number = int(pair.uid.removeprefix("img-"))
        assert (red, green, blue) == pytest.approx(colour_of(number), abs=40)
    seen = re.sub(r'src="[^"]*"', "", html).partition("<script>")[0]
    for told in ("itm_score", "kept", "rejected", "synthetic", *(pair.uid for pair in sample.drawn)):
        assert told not in seen


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour that the fixture draws the object of that picture in."""
    from PIL import ImageColor

    from blip_core.scenes import grammar

    red, green, blue = ImageColor.getrgb(tuple(grammar.COLOURS)[number % 3])[:3]
    return red, green, blue


def test_the_same_sample_gives_the_same_page(finished: Any) -> None:
    sample = draw_sample(finished.workspace, 1, 10)
    first = write_page(finished.workspace, sample).read_bytes()
    assert write_page(finished.workspace, sample).read_bytes() == first


def test_a_picture_that_is_gone_is_named(finished: Any) -> None:
    sample = draw_sample(finished.workspace, 1, 10)
    finished.workspace.shard(sample.drawn[0].shard).unlink()
    with pytest.raises(WorkspaceError, match="has no image of uid 'img-"):
        write_page(finished.workspace, sample)
