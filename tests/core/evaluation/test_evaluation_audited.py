"""What a person's marks say of a corpus stands wherever its round is shown, as long as it is that corpus."""

import html
import re
from typing import Any

import pytest

from blip_core.corpus.audited import audited_noise
from blip_core.corpus.query import run_query
from blip_core.corpus.rounds import list_rounds
from blip_core.corpus.rules import ANY_TEXT, TextRules
from blip_core.corpus.selection import publish_shard
from blip_core.evaluation.answers import estimates_of
from blip_core.evaluation.card import card
from blip_core.evaluation.report import build_report, write_report
from blip_core.evaluation.sample import draw_sample
from blip_core.files import write_json

QUERY = "SELECT audited_noise, audited_noise_low, audited_noise_high FROM rounds"


@pytest.fixture
def audited(finished: Any) -> Any:
    """A round of which somebody who knows the truth has marked 60 of 100 candidates."""
    sample = draw_sample(finished.workspace, 1, 60)
    marks = {
        number: "right" if finished.right[pair.uid, pair.candidate] else "wrong"
        for number, pair in enumerate(sample.drawn, 1)
    }
    write_json(finished.workspace.round(1).audit, estimates_of(sample, marks))
    return finished


def republish(finished: Any, where: str, text: TextRules = ANY_TEXT) -> None:
    made = finished.workspace.round(1)
    for part in made.annotations.glob("*.parquet"):
        publish_shard(part, finished.workspace.shard(part.stem), made.corpus / part.name, where, 1, text=text)


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_the_interval_holds_the_truth_and_counts_the_marks(audited: Any) -> None:
    kept = [right for key, right in audited.right.items() if audited.scores[key] > 0.5]
    truth = kept.count(False) / len(kept)
    noise = audited_noise(audited.workspace.round(1))
    assert noise is not None
    assert noise.low < noise.value < noise.high
    assert noise.low <= truth <= noise.high
    assert (noise.level, noise.marked) == (0.95, 60)


def test_rounds_report_and_card_say_the_same(audited: Any) -> None:
    noise = audited_noise(audited.workspace.round(1))
    assert noise is not None
    (row,) = list_rounds(audited.workspace)
    assert [row[f"audited_noise{end}"] for end in ("", "_low", "_high")] == [noise.value, noise.low, noise.high]
    (columns,) = run_query(audited.workspace, QUERY).to_pylist()
    assert list(columns.values()) == [noise.value, noise.low, noise.high]
    assert build_report(audited.workspace, 1)["audited_noise"] == noise._asdict()
    value, low, high = (f"{100 * share:.1f}" for share in noise[:3])
    page = words(write_report(audited.workspace, 1).read_text(encoding="utf-8"))
    assert f"of 60 pairs that a person marked follows that {value} % of the corpus's" in page
    assert f"interval of {low} % to {high} %" in page
    text = card(audited.workspace, 1)
    assert f"{value}% of its web and synthetic texts are wrong (95% interval: {low} to {high}%)" in text
    assert "No person has checked it" not in text


@pytest.mark.parametrize(
    ("where", "text"), [("itm_score > 0.6", ANY_TEXT), ("itm_score > 0.5", TextRules(languages=("en", "de")))]
)
def test_a_corpus_of_other_rules_has_not_been_marked(audited: Any, where: str, text: TextRules) -> None:
    republish(audited, where, text)
    assert audited_noise(audited.workspace.round(1)) is None
    assert run_query(audited.workspace, QUERY).to_pylist() == [
        dict.fromkeys(("audited_noise", "audited_noise_low", "audited_noise_high"))
    ]
    assert build_report(audited.workspace, 1)["audited_noise"] is None
    assert "No person has checked it" in card(audited.workspace, 1)
    republish(audited, "itm_score > 0.5")
    assert audited_noise(audited.workspace.round(1)) is not None


def test_marks_that_tell_nothing_of_the_corpus_are_no_number(audited: Any) -> None:
    made = audited.workspace.round(1)
    sample = draw_sample(audited.workspace, 1, 60)
    found = estimates_of(sample, {1: "right"})
    write_json(made.audit, found | {"estimates": {"all": {"corpus_noise": None}}})
    assert audited_noise(made) is None
    made.audit.unlink()
    assert list_rounds(audited.workspace)[0]["audited_noise"] is None
