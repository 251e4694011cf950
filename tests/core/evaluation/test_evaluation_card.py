"""The dataset card says of a corpus what the corpus says of itself, and the hub's library reads it."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from blip_core.corpus.rules import TextRules
from blip_core.corpus.schemas import CORPUS_SCHEMA, CORPUS_VERSION, write_part
from blip_core.corpus.selection import publish_shard
from blip_core.evaluation.card import card, write_card
from blip_core.evaluation.report import build_report
from blip_core.files import write_json
from blip_core.workspace import Workspace


def rows_of(workspace: Workspace) -> list[dict[str, Any]]:
    return [row for part in workspace.round(1).corpus.glob("*.parquet") for row in pq.read_table(part).to_pylist()]


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with `first`."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_front_matter_is_that_of_the_hub(finished: Any) -> None:
    data = DatasetCard.load(write_card(finished.workspace, 1)).data
    assert data.size_categories == "n<1K"
    assert data.task_categories == ["image-to-text"]
    assert (data.license, data.license_name) == ("other", "unknown")
    assert data.configs == [{"config_name": "default", "data_files": "*.parquet"}]


def test_counts_scores_and_noise_are_those_of_the_parts(finished: Any) -> None:
    finished.workspace.round(1).evaluation.unlink(missing_ok=True)
    rows = rows_of(finished.workspace)
    text = card(finished.workspace, 1)
    sources = Counter(row["source"] for row in rows)
    for source in ("web", "synthetic"):
        scores = [row["itm_score"] for row in rows if row["source"] == source]
        assert cells(text, source)[2:] == [str(sources[source]), f"{sum(scores) / len(scores):.3f}"]
    assert cells(text, "human")[2] == str(sources["human"])
    assert f"\n{len({row['image_sha256'] for row in rows})} images have a text here." in text
    judged = [row["itm_score"] for row in rows if row["source"] != "human"]
    assert f"{100 * (1 - sum(judged) / len(judged)):.1f}% of its web and synthetic texts are wrong. No person" in text


def test_rules_and_what_they_rejected_are_told(finished: Any) -> None:
    made, rules = finished.workspace.round(1), TextRules(min_words=3, reject_markup=True)
    short = wrong = 0
    for part in made.annotations.glob("*.parquet"):
        target = made.corpus / part.name
        publish_shard(part, finished.workspace.shard(part.stem), target, "itm_score > 0.5", 1, text=rules)
        for row in pq.read_table(part).to_pylist():
            wrong += row["itm_score"] <= 0.5
            short += row["itm_score"] > 0.5 and len(row["text"].split()) < 3
    text = card(finished.workspace, 1)
    assert "\nFurther rules: `text.min_words: 3`,\n`text.reject_markup: true`.\n" in text
    report = build_report(finished.workspace, 1)
    assert report["rules"] == {"text.min_words": 3, "text.reject_markup": True}
    assert report["rejected"] == {reason: n for reason, n in (("where", wrong), ("few_words", short)) if n}
    assert f"Rejected: `where` {wrong}" in text


def test_known_truth_stands_in_place_of_the_estimate(finished: Any) -> None:
    write_json(finished.workspace.round(1).evaluation, {"audit": {"corpus_noise": 0.125, "web_noise": 0.5}})
    text = card(finished.workspace, 1)
    assert (
        "12.5% of its web and synthetic texts are wrong, by the known truth; of the web's own texts, 50.0% were."
        in text
    )
    assert "estimate" not in text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:secret@Shop.Test:8080/a.jpg", "`shop.test`"),
        ("https://[2001:db8::1]/a.jpg", "`[2001:db8::1]`"),
        ("http://a|b`<img src=x>\n!/a.jpg", "`a?b??img?src?x???`"),
    ],
)
def test_a_domain_is_shown_without_what_would_be_markup(url: str, shown: str, tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "workspace")
    row = {
        "uid": "u",
        "url": url,
        "text": "a",
        "source": "web",
        "candidate": 0,
        "itm_score": 0.75,
        "image_sha256": "5a",
    }
    counts = {"capfilt.kept": "1", "capfilt.rejected": "0", "capfilt.where": "itm_score > 0.5"}
    table = pa.Table.from_pylist([row | {"image_sha256": "5a"}], CORPUS_SCHEMA)
    write_part(
        workspace.round(1).corpus / "aaaa.parquet", table, CORPUS_VERSION, "mark", counts | {"capfilt.best_of": "true"}
    )
    text = card(workspace, 1)
    assert cells(text, shown) == [shown, "1", "1"]
    assert "`itm_score > 0.5` is true, of an image's synthetic texts the best one alone," in text


def test_a_card_that_would_be_the_same_is_left_as_it_is(finished: Any) -> None:
    path = write_card(finished.workspace, 1)
    assert path is not None
    os.utime(path, (1, 1))
    assert write_card(finished.workspace, 1) == path
    assert path.stat().st_mtime == 1
    path.write_text("of another corpus")
    write_card(finished.workspace, 1)
    assert path.read_text() == card(finished.workspace, 1)


def test_without_a_corpus_there_is_no_card(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "workspace")
    workspace.round(1).root.mkdir(parents=True)
    assert write_card(workspace, 1) is None
