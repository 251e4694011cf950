"""The audit against counting by hand, and AUC against every pair."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.errors import InputError
from blip_core.evaluation.audit import auc, audit


def pairwise_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    wins = [(s > t) + 0.5 * (s == t) for s in scores[labels] for t in scores[~labels]]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [1, 12])
def test_auc_counts_pairs_ties_half(seed: int, digits: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(60) < 0.4
    scores = np.round(rng.random(60) + 0.3 * labels, digits)
    area = auc(scores.tolist(), labels.tolist())
    assert area.value == pytest.approx(pairwise_auc(scores, labels))
    assert 0 <= area.low <= area.value <= area.high <= 1


def test_interval_covers_the_true_area_about_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    true_area, hits, runs = 0.76025, 0, 400  # normal scores whose means differ by one: Phi(1 / sqrt 2)
    for _ in range(runs):
        labels = np.arange(120) < 60
        scores = rng.normal(size=120) + labels
        area = auc(scores, labels)
        hits += area.low <= true_area <= area.high
    assert 0.91 < hits / runs < 0.985


def test_interval_is_delongs_as_computed_pair_by_pair() -> None:
    rng = np.random.default_rng(3)
    labels = rng.random(50) < 0.5
    scores = rng.random(50) + 0.4 * labels
    right, wrong = scores[labels], scores[~labels]
    of_right = [np.mean([(s > t) + 0.5 * (s == t) for t in wrong]) for s in right]
    of_wrong = [np.mean([(s > t) + 0.5 * (s == t) for s in right]) for t in wrong]
    error = np.sqrt(np.var(of_right, ddof=1) / len(right) + np.var(of_wrong, ddof=1) / len(wrong))
    area = auc(scores, labels)
    assert area.high - area.low == pytest.approx(2 * 1.959964 * error, rel=1e-5)


def test_auc_of_one_kind_alone_is_unknown() -> None:
    assert auc([0.1, 0.9], [True, True]) is None
    assert auc([], []) is None


def test_audit_counts_what_a_hand_count_of_the_fixture_gives(finished: Any) -> None:
    found = audit(finished.workspace, 1, finished.truth)
    web = [key for key in finished.right if key[1] == 0]
    synthetic = [key for key in finished.right if key[1] == 1]
    kept = [key for key in finished.right if finished.scores[key] > 0.5]

    def noise(keys: list[tuple[str, int]]) -> float:
        return sum(not finished.right[key] for key in keys) / len(keys)

    assert found["web_noise"] == pytest.approx(noise(web))
    assert found["synthetic_noise"] == pytest.approx(noise(synthetic))
    assert found["corpus_noise"] == pytest.approx(noise(kept))
    assert found["corpus_web_noise"] == pytest.approx(noise([key for key in kept if key[1] == 0]))
    matched = [key for key in web if finished.scores[key] > 0.5]
    right = [key for key in web if finished.right[key]]
    both = [key for key in matched if finished.right[key]]
    assert found["filter_precision"] == pytest.approx(len(both) / len(matched))
    assert found["filter_recall"] == pytest.approx(len(both) / len(right))
    scores = np.array([finished.scores[key] for key in web])
    labels = np.array([finished.right[key] for key in web])
    assert found["filter_auc"] == pytest.approx(pairwise_auc(scores, labels))
    low, high = found["filter_auc_interval"]
    assert low < found["filter_auc"] <= high
    assert (found["web_texts"], found["unknown"]) == (50, 0)


def test_images_that_the_truth_does_not_know_are_counted_and_left_out(finished: Any) -> None:
    table = pq.read_table(finished.truth)
    known = table.filter(pa.array([number % 10 != 0 for number in range(table.num_rows)]))
    pq.write_table(known, finished.truth)
    found = audit(finished.workspace, 1, finished.truth)
    uids = set(known["uid"].to_pylist())
    web = [right for (uid, candidate), right in finished.right.items() if candidate == 0 and uid in uids]
    assert found["unknown"] == 10  # the web and the synthetic text of five images
    assert found["web_texts"] == len(web) == 45
    assert found["web_noise"] == pytest.approx(web.count(False) / len(web))


def test_round_without_annotations_has_no_numbers(finished: Any) -> None:
    found = audit(finished.workspace, 2, finished.truth)
    assert found["web_noise"] is found["corpus_noise"] is found["filter_auc"] is found["filter_auc_interval"] is None
    assert found["web_texts"] == 0


def test_truth_that_is_no_truth_table_is_named(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.parquet"):
        audit(finished.workspace, 1, tmp_path / "missing.parquet")
    with pytest.raises(InputError, match="kind"):
        audit(finished.workspace, 1, finished.workspace.round(1).corpus / "5ce4e50000000001.parquet")
