"""The audit's page in a real browser, from a file: marking by keys, going on after a reload, and hostile texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Page, expect
from services.browser import Browser, browser
from services.rounds import make_round

from blip_core.evaluation.answers import audit_answers
from blip_core.evaluation.audit_page import write_page
from blip_core.evaluation.sample import Sample, draw_sample
from blip_core.workspace import Workspace

pytestmark = pytest.mark.timeout(300)

TEXTS = [
    "</p></article></main><script>document.title = 'owned'</script>",
    "<img src=http://evil.test/x.png onerror=\"document.title='owned'\">",
    "<style>body { display: none }</style><base href=http://evil.test/>",
    "‮backwards⁦ and so on",
    "&lt;b&gt; {{ 7 * 7 }} ' \" ` ${location}",
    "javascript:alert(1)",
    *(f"a small square, number {number}" for number in range(6)),
]


class Audited(NamedTuple):
    """A page that is open, and the sample that it shows."""

    shown: Browser
    page: Page
    workspace: Workspace
    sample: Sample
    errors: list[str]


@pytest.fixture
def audited(tmp_path: Path) -> Iterator[Audited]:
    workspace = make_round(tmp_path / "workspace", TEXTS)
    sample = draw_sample(workspace, 1)
    path = write_page(workspace, sample)
    (tmp_path / "profile").mkdir()
    with browser(tmp_path / "profile") as shown:
        errors: list[str] = []
        shown.page.on("pageerror", lambda error: errors.append(str(error)))
        shown.page.on("dialog", lambda dialog: errors.append(dialog.message))
        shown.page.goto(path.as_uri())
        yield Audited(shown, shown.page, workspace, sample, errors)


def press(page: Page, keys: str) -> None:
    for key in keys:
        page.keyboard.press({"<": "ArrowLeft", ">": "ArrowRight", "~": "Backspace"}.get(key, key))


def visible(page: Page) -> int:
    """The number of the pair that is shown."""
    (card,) = page.locator("article:visible").all()
    return int(str(card.get_attribute("data-number")))


def counts(page: Page) -> str:
    return page.locator("#counts").inner_text()


def download(page: Page) -> dict[str, Any]:
    with page.expect_download() as waiting:
        press(page, "d")
    found: dict[str, Any] = json.loads(waiting.value.path().read_text())
    return found


def test_keys_mark_pairs_and_go_on_to_the_next_one(audited: Audited) -> None:
    page = audited.page
    assert visible(page) == 1
    assert counts(page) == "0 of 12 marked: 0 right, 0 wrong, 0 unsure"
    press(page, "rwuR")
    assert visible(page) == 5
    assert counts(page) == "4 of 12 marked: 2 right, 1 wrong, 1 unsure"
    assert page.locator("#progress").evaluate("bar => bar.value") == 4
    press(page, "<<<")
    assert visible(page) == 2
    expect(page.locator("article:visible .mark")).to_have_text("wrong")
    press(page, "r")
    assert visible(page) == 5  # the next one that has no mark
    assert counts(page) == "4 of 12 marked: 3 right, 0 wrong, 1 unsure"


def test_undo_takes_marks_back_one_after_the_other(audited: Audited) -> None:
    page = audited.page
    press(page, "rw<u")
    assert counts(page) == "2 of 12 marked: 1 right, 0 wrong, 1 unsure"
    press(page, "z")
    assert (visible(page), counts(page)) == (2, "2 of 12 marked: 1 right, 1 wrong, 0 unsure")
    press(page, "~")
    assert (visible(page), counts(page)) == (2, "1 of 12 marked: 1 right, 0 wrong, 0 unsure")
    press(page, "zzz")
    assert (visible(page), counts(page)) == (1, "0 of 12 marked: 0 right, 0 wrong, 0 unsure")


def test_a_key_that_is_held_down_or_pressed_with_control_marks_no_more(audited: Audited) -> None:
    page = audited.page
    for _ in range(4):
        page.keyboard.down("r")
    page.keyboard.up("r")
    page.keyboard.press("Control+u")
    assert counts(page) == "1 of 12 marked: 1 right, 0 wrong, 0 unsure"


def test_buttons_do_what_keys_do(audited: Audited) -> None:
    page = audited.page
    for name in ("right", "wrong", "unsure", "undo"):
        page.locator(f"button[data-action={name}]").click()
    press(page, " ")  # a space does not press the last button again
    assert counts(page) == "2 of 12 marked: 1 right, 1 wrong, 0 unsure"


def test_answers_outlive_a_reload_and_can_be_taken_back_after_it(audited: Audited) -> None:
    page = audited.page
    press(page, "rwu")
    expect(page.locator("#saved")).to_contain_text("saved in this browser")
    page.reload()
    assert (visible(page), counts(page)) == (4, "3 of 12 marked: 1 right, 1 wrong, 1 unsure")
    press(page, "z")
    assert (visible(page), counts(page)) == (3, "2 of 12 marked: 1 right, 1 wrong, 0 unsure")


def test_what_another_page_left_under_the_samples_name_is_not_taken_for_answers(audited: Audited) -> None:
    page = audited.page
    for left in ('{"answers": {"99": "right"}, "history": []}', '{"answers": {"1": "<b>"}, "history": []}', "{", "7"):
        page.evaluate(f"localStorage.setItem('capfilt-audit-{audited.sample.name}', {json.dumps(left)})")
        page.reload()
        assert counts(page) == "0 of 12 marked: 0 right, 0 wrong, 0 unsure"
    assert audited.errors == []


def test_a_browser_that_saves_nothing_is_said_and_marking_goes_on(audited: Audited) -> None:
    page = audited.page
    page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    page.reload()
    press(page, "rr")
    expect(page.locator("#saved")).to_contain_text("download the answers before you close it")
    assert counts(page) == "2 of 12 marked: 2 right, 0 wrong, 0 unsure"
    assert len(download(page)["answers"]) == 2


def test_the_downloaded_answers_are_those_that_were_marked_and_give_estimates(audited: Audited, tmp_path: Path) -> None:
    page, sample = audited.page, audited.sample
    kept = [sample.strata[pair.stratum].kept for pair in sample.drawn]
    press(page, "".join("r" if passed else "w" for passed in kept))
    assert counts(page) == "12 of 12 marked: 6 right, 6 wrong, 0 unsure"
    with page.expect_download() as waiting:
        press(page, "d")
    assert waiting.value.suggested_filename == f"capfilt-audit-{sample.name}.json"
    path = tmp_path / "answers.json"
    waiting.value.save_as(path)
    found = audit_answers(audited.workspace, path)
    assert (found["right"], found["wrong"]) == (6, 6)
    assert found["estimates"]["all"]["corpus_noise"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["estimates"]["all"]["filter_recall"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_hostile_text_is_read_and_does_nothing(audited: Audited) -> None:
    page = audited.page
    read = []
    for _ in TEXTS:
        text = page.locator("article:visible .text")
        expect(text).to_be_visible()
        read.append(text.evaluate("paragraph => paragraph.textContent"))
        assert text.evaluate("paragraph => paragraph.children.length") == 0
        press(page, ">")
    assert read == [pair.text for pair in audited.sample.drawn]
    assert sorted(read) == sorted(TEXTS)
    assert page.title() == "capfilt · audit of round 1"
    assert page.locator("img").count() == page.locator("article").count() == 12
    assert audited.errors == []
    assert audited.shown.foreign == set()


def test_the_policy_stops_what_would_be_put_into_the_page(audited: Audited) -> None:
    page = audited.page
    stopped = page.evaluate("""() => new Promise((done) => {
        const stopped = [];
        document.addEventListener("securitypolicyviolation", (event) => {
            stopped.push(event.effectiveDirective);
            if (stopped.length === 3) done(stopped.sort());
        });
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        const picture = document.createElement("img");
        picture.src = "http://127.0.0.1:9/x.png";
        const style = document.createElement("style");
        style.textContent = "body { display: none }";
        document.body.append(script, picture, style);
    })""")
    assert stopped == ["img-src", "script-src-elem", "style-src-elem"]
    assert page.title() == "capfilt · audit of round 1"
    expect(page.locator("#counts")).to_be_visible()


def test_every_picture_is_painted(audited: Audited) -> None:
    page = audited.page
    for _ in TEXTS:
        picture = page.locator("article:visible img")
        expect(picture).to_be_visible()
        page.wait_for_function("() => document.querySelector('article:not([hidden]) img').naturalWidth === 40")
        press(page, ">")
