"""The report: the object's numbers, and a page that is safe, whole and without links."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip_core.errors import WorkspaceError
from blip_core.evaluation.charts import score_histogram, training_curves
from blip_core.evaluation.report import build_report, write_report
from blip_core.workspace import Workspace

REQUIRED = {"images", "candidates", "accepted", "web_noise", "corpus_noise", "filter_auc"}
REQUIRED |= {"retrieval", "captioning", "seconds"}


class Page(HTMLParser):
    """Every tag with its attributes, and all text outside of style sheets."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def images(self) -> list[str]:
        return [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]


def test_report_object_has_the_promised_keys_and_the_rounds_own_counts(evaluated: Any) -> None:
    report = build_report(evaluated.workspace, 1)
    assert report.keys() >= REQUIRED
    kept = [key for key, score in evaluated.scores.items() if score > 0.5]
    assert (report["images"], report["candidates"], report["accepted"]) == (50, 100, len(kept))
    assert report["human"] == 3
    assert report["download"] == {"rows": 60, "ok": 50, "failed": 10, "reasons": {"not_found": 10}}
    kept_web = sum(candidate == 0 for _, candidate in kept)
    assert report["by_source"]["web"] == {"candidates": 50, "accepted": kept_web}
    assert report["where"] == "itm_score > 0.5"
    assert (report["web_noise"], report["corpus_noise"], report["filter_auc"]) == (0.6, 0.1, 0.95)
    assert set(report["retrieval"]) == set(report["captioning"]) == {"med", "retrained-raw", "retrained"}
    assert list(report["seconds"]) == ["download", "pretrain", "annotate", "publish"]
    assert json.loads(json.dumps(report)) == report


def test_report_of_a_round_without_training_has_means_digests_and_speed(finished: Any) -> None:
    made = finished.workspace.round(1)
    assert build_report(finished.workspace, 1)["images_per_second"] is None
    made.add_seconds("annotate", 20.0)
    made.add_images("annotate", 50)
    report = build_report(finished.workspace, 1)
    for source, web in (("web", True), ("synthetic", False)):
        scores = [score for (_, candidate), score in finished.scores.items() if (candidate == 0) == web]
        mean = sum(scores) / len(scores)
        assert report["scores"][source] == pytest.approx({"itm_score": mean, "itc_score": mean / 2})
    assert report["models"] == {"captioner": ["c0ffee"], "filter": ["f11733"]}
    assert report["images_per_second"] == 2.5
    text = " ".join(Page(write_report(finished.workspace, 1).read_text(encoding="utf-8")).text.split())
    assert "Captioner c0ffee and Filter f11733" in text
    assert "2.5 /s" in text
    assert re.search(rf"web ?50{report['scores']['web']['itm_score']:.3f}", text)


def test_report_without_truth_held_out_set_or_retraining_says_so(finished: Any) -> None:
    report = build_report(finished.workspace, 1)
    assert report["filter_auc"] is report["web_noise"] is report["corpus_noise"] is None
    assert report["retrieval"] == report["captioning"] == report["seconds"] == {}
    page = Page(write_report(finished.workspace, 1).read_text(encoding="utf-8"))
    for sentence in ("No model has been evaluated", "truth of these web texts is not known", "No model was trained"):
        assert sentence in page.text


def test_report_of_a_round_that_has_only_begun_is_written(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "workspace")
    workspace.round(1).root.mkdir(parents=True)
    assert build_report(workspace, 1)["candidates"] == 0
    assert "Nothing has been annotated yet" in write_report(workspace, 1).read_text(encoding="utf-8")


def test_page_shows_web_texts_as_text_and_links_to_nothing(evaluated: Any) -> None:
    html = write_report(evaluated.workspace, 1).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script>alert('shapes & more')</script>" in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    )
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "background"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/jpeg;base64,", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert not any("//" in (value or "") for name, value in attributes.items() if name not in ("src", "title"))
    assert not re.search(r"url\((?!#)|@import", html)


def test_pictures_of_the_grids_are_small_jpegs_of_one_image_each(evaluated: Any) -> None:
    page = Page(write_report(evaluated.workspace, 1, examples=5).read_text(encoding="utf-8"))
    assert len(page.images) == 3 * 5 + 3
    for source in page.images:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) <= 160


def test_grids_hold_the_best_and_the_worst_of_each_verdict(evaluated: Any) -> None:
    page = Page(write_report(evaluated.workspace, 1, examples=4).read_text(encoding="utf-8"))
    shown = [float(score) for score in re.findall(r"(?:web|synthetic)(0\.\d{3})", page.text)]
    by_image: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for (uid, _), score in evaluated.scores.items():
        by_image[score > 0.5].setdefault(uid, []).append(score)
    best_kept = sorted(map(max, by_image[True].values()), reverse=True)[:4]
    worst_kept = sorted(map(min, by_image[True].values()))[:4]
    best_rejected = sorted(map(max, by_image[False].values()), reverse=True)[:4]
    assert shown == pytest.approx([*best_kept, *worst_kept, *best_rejected], abs=6e-4)


def test_before_and_after_stand_side_by_side_with_their_difference(evaluated: Any) -> None:
    page = Page(write_report(evaluated.workspace, 1).read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert re.search(r"text to image, R@1 ?20\.0\s%25\.0\s%40\.0\s%\+15\.0", text)
    assert re.search(r"captions, CIDEr ?60\.075\.0120\.0\+45\.0", text)


def test_same_round_gives_the_same_page(evaluated: Any) -> None:
    first = write_report(evaluated.workspace, 1).read_bytes()
    assert write_report(evaluated.workspace, 1).read_bytes() == first


def test_charts_are_inline_svg_in_the_pages_own_ink() -> None:
    curve = [{"step": step, "itc": 1 / step, "itm": None, "lm": None} for step in (1, 2, 3)]
    for svg in (score_histogram({"web": [3, 0, 1], "synthetic": [0, 2, 5]}), training_curves({"med": curve})):
        page = Page(svg)
        assert page.tags[0][0] == "svg"
        assert "http" not in svg
        assert "currentColor" in svg
        assert "metadata" not in {tag for tag, _ in page.tags}
    assert "web texts" in Page(score_histogram({"web": [1]})).text


def test_round_that_is_not_there_is_named_with_those_that_are(finished: Any) -> None:
    with pytest.raises(WorkspaceError, match="no round 7; the rounds are: 1"):
        build_report(finished.workspace, 7)
