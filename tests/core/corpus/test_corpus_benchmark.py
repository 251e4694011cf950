"""The benchmark of the corpus, at a size at which its times say nothing: what it measures is the right thing."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ROWS_KEY, UNSCORED_KEY
from blip_core.data.shards import read_shard

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = 5001  # of two shards; not a whole number of images


@pytest.fixture(scope="module")
def corpus() -> Iterator[Any]:
    """tests/benchmarks/corpus.py as a module, with those beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import corpus

        patch.setattr(corpus, "LEAST_SECONDS", 0.0)
        yield corpus


@pytest.fixture(scope="module")
def measured(corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, corpus.measure(folder, Namespace(rows=ROWS, embedded=100, alike=200, repeats=1))


def test_views_and_files_give_the_same_answers_and_no_answer_is_empty(corpus: Any, measured: tuple) -> None:
    _, figures = measured
    assert list(figures["questions"]) == list(corpus.QUESTIONS)
    for name, asked in figures["questions"].items():
        assert asked["same"], name
        assert asked["rows"] > 0, name


def test_every_publication_accounts_for_all_candidates(measured: tuple) -> None:
    _, figures = measured
    assert list(figures["published"]) == ["predicate", "rules", "near_duplicates"]
    for name, published in figures["published"].items():
        assert published["complete"], name
        assert 50 < published["peak_memory_mb"] < 4000, name
    reasons = figures["published"]["rules"]["by_reason"]
    assert {"best_of", "same_image", "repetitive", "markup", "few_words", "where"} <= set(reasons)
    assert figures["published"]["near_duplicates"]["by_reason"]["near_duplicate"] > 0


def test_the_candidates_are_as_many_as_were_asked_for_and_as_a_download_and_an_annotation_leave_them(
    measured: tuple,
) -> None:
    folder, _ = measured
    parts = sorted((folder / "all" / "rounds" / "0001" / "annotations").glob("*.parquet"))
    total = 0
    for part in parts:
        rows = pq.read_table(part, partitioning=None)
        assert rows.schema.remove_metadata() == ANNOTATION_SCHEMA
        assert rows.sort_by([("uid", "ascending"), ("candidate", "ascending")]).equals(rows)
        metadata = pq.read_metadata(part).metadata
        assert int(metadata[ROWS_KEY.encode()]) == rows.num_rows
        assert int(metadata[UNSCORED_KEY.encode()]) == rows["itm_score"].null_count
        images = read_shard(folder / "all" / "shards" / part.name).to_pylist()
        arrived = {row["uid"]: (row["url"], row["sha256"]) for row in images if row["status"] == "ok"}
        assert {row["uid"]: (row["url"], row["image_sha256"]) for row in rows.to_pylist()} == arrived
        assert [row["uid"] for row in images] == sorted(row["uid"] for row in images)
        total += rows.num_rows
    assert len(parts) == 2
    assert total == 5004


def test_what_is_not_as_it_should_be_is_told(corpus: Any, measured: tuple) -> None:
    _, figures = measured
    good = dict(figures["questions"]["sources"], catalog_ratio=1.0, query_ratio=1.1)
    bad = dict(good, same=False, query_ratio=1.2)
    fine = dict(figures["published"]["rules"])
    assert corpus.faults({"questions": {"sources": good}, "published": {"rules": fine}}) == []
    heavy = dict(fine, complete=False, peak_memory_mb=5000)
    found = corpus.faults({"questions": {"sources": bad}, "published": {"rules": heavy}})
    assert [line.split(":")[0] for line in found] == ["sources"] * 2 + ["publishing by rules"] * 2
    assert "sources" in corpus.told(figures)
    assert "near_duplicates" in corpus.told(figures)
