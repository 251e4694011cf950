"""A sweep says what publishing would keep, for many predicates at once."""

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.corpus.rules import ImageRules, PublishConfig, TextRules
from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.corpus.selection import publish_shard
from blip_core.corpus.sweep import not_asked, predicate_of, sweep
from blip_core.errors import ConfigError, QueryError, WorkspaceError
from blip_core.workspace import Workspace

PREDICATES = [
    "itm_score > 0.15",
    "itm_score > 0.45",
    "width >= 42 AND source = 'web'",
    "text LIKE '%3%' OR itc_score > 0.4",
]


@pytest.fixture
def many_candidates(workspace: Workspace) -> Workspace:
    """Four synthetic texts for each image, some of one score."""
    chance = random.Random(0)
    for part in workspace.round(1).annotations.glob("*.parquet"):
        rows = pq.read_table(part).to_pylist()
        more = [
            row | {"candidate": number, "itm_score": chance.randrange(8) / 8, "reason": None, "text": f"text {number}"}
            for row in rows
            if row["source"] == "synthetic"
            for number in range(1, 5)
        ]
        web = [row for row in rows if row["source"] == "web"]
        write_part(part, pa.Table.from_pylist(web + more, ANNOTATION_SCHEMA), ANNOTATION_VERSION, "0123456789abcdef")
    return workspace


def published(workspace: Workspace, folder: Path, where: str, best_of: bool) -> pa.Table:
    """What publishing keeps of every shard."""
    parts = []
    for annotation in sorted(workspace.round(1).annotations.glob("*.parquet")):
        publish_shard(annotation, workspace.shard(annotation.stem), folder / annotation.name, where, 1, best_of)
        parts.append(pq.read_table(folder / annotation.name))
    return pa.concat_tables(parts)


@pytest.mark.parametrize("best_of", [False, True])
def test_a_sweep_counts_what_publishing_keeps(shared_workspace: Workspace, tmp_path: Path, best_of: bool) -> None:
    for number, row in enumerate(sweep(shared_workspace, 1, PREDICATES, best_of)):
        kept = published(shared_workspace, tmp_path / str(number), PREDICATES[number], best_of)
        sources = Counter(kept["source"].to_pylist())
        assert row["where"] == PREDICATES[number]
        assert row["images"] == len(set(kept["uid"].to_pylist()))
        assert (row["web"], row["synthetic"]) == (sources["web"], sources["synthetic"])
        assert row["rejected"] == 20 - kept.num_rows
        scores = kept["itm_score"].to_pylist()
        assert row["estimated_noise"] == pytest.approx(1 - sum(scores) / len(scores))


def test_the_best_of_many_synthetic_texts_is_the_one_that_publishing_keeps(
    many_candidates: Workspace, tmp_path: Path
) -> None:
    (row,) = sweep(many_candidates, 1, ["itm_score > 0.2"], best_of=True)
    kept = published(many_candidates, tmp_path, "itm_score > 0.2", best_of=True)
    assert row["synthetic"] == Counter(kept["source"].to_pylist())["synthetic"] > 0
    scores = kept["itm_score"].to_pylist()
    assert row["estimated_noise"] == pytest.approx(1 - sum(scores) / len(scores))


def test_the_pairs_at_the_edge_are_the_surest_on_either_side(shared_workspace: Workspace) -> None:
    (row,) = sweep(shared_workspace, 1, ["itm_score > 0.45"], examples=2)
    assert [(pair["uid"], pair["itm_score"]) for pair in row["least_kept"]] == [
        ("aaaa-2", pytest.approx(0.5)),
        ("bbbb-2", pytest.approx(0.5)),
    ]
    assert [pair["itm_score"] for pair in row["most_rejected"]] == [pytest.approx(0.4)] * 2
    assert {pair["source"] for pair in row["most_rejected"]} == {"web"}


def test_a_predicate_that_keeps_nothing_has_no_noise(shared_workspace: Workspace) -> None:
    (row,) = sweep(shared_workspace, 1, ["itm_score > 2"], examples=3)
    assert (row["images"], row["web"], row["synthetic"], row["rejected"]) == (0, 0, 0, 20)
    assert row["estimated_noise"] is None
    assert row["least_kept"] == []
    assert len(row["most_rejected"]) == 3


def test_a_number_is_a_threshold_of_itm_score() -> None:
    assert predicate_of("0.7") == "itm_score > 0.7"
    assert predicate_of("width > 10") == "width > 10"


@pytest.mark.parametrize(
    "bad", ["itm_scor > 1", "itm_score", "true) OR (true", "(SELECT count(*) FROM '/etc/passwd') > 0"]
)
def test_what_is_no_predicate_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"^publish\.where"):
        predicate_of(bad)


def test_a_predicate_that_fails_on_a_row_is_told_in_one_line(shared_workspace: Workspace) -> None:
    with pytest.raises(QueryError, match=r"^sweep: Conversion Error") as caught:
        sweep(shared_workspace, 1, ["text::INTEGER > 0"])
    assert "\n" not in str(caught.value)


def test_a_round_without_annotations_is_told(shared_workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="round 7 has no annotations"):
        sweep(shared_workspace, 7, ["itm_score > 0.5"])


def test_rules_of_a_configuration_are_asked_beside_each_predicate(many_candidates: Workspace, tmp_path: Path) -> None:
    rules = PublishConfig("true", text=TextRules(max_words=2), images=ImageRules(min_side=30, max_side=42, unique=True))
    rows = sweep(many_candidates, 1, PREDICATES, best_of=True, rules=rules)
    for number, row in enumerate(rows):
        alone = PublishConfig(PREDICATES[number], True, rules.text, ImageRules(min_side=30, max_side=42))
        parts = []
        for annotation in sorted(many_candidates.round(1).annotations.glob("*.parquet")):
            target = tmp_path / str(number) / annotation.name
            shard = many_candidates.shard(annotation.stem)
            publish_shard(annotation, shard, target, alone.where, 1, True, alone.text, alone.images)
            parts.append(pq.read_table(target))
        kept = pa.concat_tables(parts)
        assert (row["web"] + row["synthetic"], row["images"]) == (kept.num_rows, len(set(kept["uid"].to_pylist())))
    assert 0 < rows[0]["web"] + rows[0]["synthetic"] < rows[0]["rejected"]
    assert not_asked(rules) == ["publish.images.unique"]
