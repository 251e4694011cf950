"""The sample: the same on any machine, as random as it says, and of each stratum what it should have."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from services.rounds import make_round

from blip_core.corpus.selection import publish_shard
from blip_core.errors import WorkspaceError
from blip_core.evaluation.sample import allocate, draw_sample
from blip_core.workspace import Workspace


@given(st.lists(st.integers(1, 10_000), max_size=16), st.integers(0, 2_000), st.integers(0, 20))
def test_an_allocation_draws_what_is_wanted_and_no_more_of_a_stratum_than_it_has(
    sizes: list[int], pairs: int, least: int
) -> None:
    drawn = allocate(sizes, pairs, least)
    assert sum(drawn) == min(pairs, sum(sizes))
    assert all(0 <= number <= size for number, size in zip(drawn, sizes, strict=True))
    if pairs >= least * len(sizes):
        assert all(number >= min(least, size) for number, size in zip(drawn, sizes, strict=True))


def test_an_allocation_is_in_proportion_where_no_stratum_is_small() -> None:
    assert allocate([6000, 3000, 1000], 200) == [120, 60, 20]
    assert allocate([10_000, 5], 100) == [95, 5]


def test_half_of_the_sample_is_kept_and_half_rejected_and_the_rest_of_a_short_half_goes_to_the_other(
    tmp_path: Path,
) -> None:
    even = draw_sample(make_round(tmp_path / "even", ["a text"] * 200), 1, 60)
    assert Counter(even.strata[pair.stratum].kept for pair in even.drawn) == {True: 30, False: 30}
    strict = draw_sample(make_round(tmp_path / "strict", ["a text"] * 200, "itm_score > 0.96"), 1, 60)
    assert Counter(strict.strata[pair.stratum].kept for pair in strict.drawn) == {True: 8, False: 52}


def test_a_drawn_pair_is_of_its_stratum(finished: Any) -> None:
    sample = draw_sample(finished.workspace, 1, 40)
    assert len(sample.drawn) == len({(pair.uid, pair.candidate) for pair in sample.drawn}) == 40
    rows = {
        (row["uid"], row["candidate"]): row
        for row in pq.read_table(next(finished.workspace.round(1).annotations.iterdir())).to_pylist()
    }
    for pair in sample.drawn:
        row, stratum = rows[pair.uid, pair.candidate], sample.strata[pair.stratum]
        assert stratum.low < row["itm_score"] <= stratum.high
        assert stratum.kept == (row["itm_score"] > 0.5) == stratum.matched
        assert (stratum.source, pair.text) == (row["source"], row["text"])
    drawn = Counter(pair.stratum for pair in sample.drawn)
    assert [drawn[place] for place in range(len(sample.strata))] == [stratum.drawn for stratum in sample.strata]
    assert sum(stratum.size for stratum in sample.strata) == len(finished.scores)


def test_a_seed_draws_the_same_sample_however_the_parts_are_cut(finished: Any) -> None:
    before = draw_sample(finished.workspace, 1, 40, seed=5)
    assert draw_sample(finished.workspace, 1, 40, seed=6).name != before.name
    folder = finished.workspace.round(1).annotations
    (part,) = folder.iterdir()
    rows = pq.read_table(part)
    for place, first in enumerate(reversed(range(0, rows.num_rows, 7))):
        pq.write_table(rows.slice(first, 7), folder / f"{place:016x}.parquet", row_group_size=2)
    part.unlink()
    assert draw_sample(finished.workspace, 1, 40, seed=5) == before


def test_another_predicate_makes_another_sample(finished: Any) -> None:
    before = draw_sample(finished.workspace, 1, 40)
    paths = finished.workspace.round(1)
    (part,) = paths.annotations.iterdir()
    publish_shard(part, finished.workspace.shard(part.stem), paths.corpus / part.name, "itm_score > 0.6", 1)
    after = draw_sample(finished.workspace, 1, 40)
    assert after.where == "itm_score > 0.6"
    assert after.name != before.name


def test_every_candidate_of_a_stratum_is_drawn_as_often_as_any_other_and_comes_at_any_place(finished: Any) -> None:
    seeds = 120
    drawn: Counter[tuple[str, int]] = Counter()
    places: Counter[int] = Counter()
    for seed in range(seeds):
        sample = draw_sample(finished.workspace, 1, 20, seed)
        drawn.update((pair.uid, pair.candidate) for pair in sample.drawn)
        places.update(place for place, pair in enumerate(sample.drawn) if sample.strata[pair.stratum].kept)
    cells = draw_sample(finished.workspace, 1, 20).strata
    largest = max(cells, key=lambda stratum: stratum.size)
    members = [
        key
        for key, score in finished.scores.items()
        if (key[1] == 0) == (largest.source == "web") and largest.low < score <= largest.high
    ]
    assert len(members) == largest.size
    expected = seeds * largest.drawn / largest.size
    surprise = sum((drawn[key] - expected) ** 2 / expected for key in members)
    assert surprise < largest.size + 4 * (2 * largest.size) ** 0.5  # chi-square, whose mean is about its size
    assert np.std([places[place] for place in range(20)]) < 2 * (seeds / 4) ** 0.5


def test_a_round_without_corpus_or_scores_is_named(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no round 7; the rounds are: 1"):
        draw_sample(finished.workspace, 7)
    begun = Workspace.open(tmp_path / "begun")
    begun.round(1).root.mkdir(parents=True)
    with pytest.raises(WorkspaceError, match="no corpus to audit"):
        draw_sample(begun, 1)
