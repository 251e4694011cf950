"""A person's answers: what they say where the truth is known, and how those of another sample are refused."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from blip_core.corpus.selection import publish_shard
from blip_core.errors import InputError
from blip_core.evaluation.answers import ANSWERS_VERSION, audit_answers, estimates_of
from blip_core.evaluation.audit import audit
from blip_core.evaluation.audit_page import write_page
from blip_core.evaluation.sample import Sample, draw_sample
from blip_core.files import read_json
from blip_core.stores import located, read_bytes
from blip_core.workspace import Workspace


def truthful(finished: Any, sample: Sample) -> dict[str, str]:
    """What somebody would mark who knows the truth."""
    right = (finished.right[pair.uid, pair.candidate] for pair in sample.drawn)
    return {str(number): "right" if true else "wrong" for number, true in enumerate(right, 1)}


def written(path: Path, sample: Sample, answers: Any, changes: Mapping[str, Any] | None = None) -> Path:
    value = {"schema": ANSWERS_VERSION, "sample": sample.name, "round": sample.round}
    value |= {"seed": sample.seed, "pairs": sample.pairs, "answers": answers}
    path.write_text(json.dumps(value | dict(changes or {})))
    return path


def test_a_round_of_which_all_is_marked_has_the_truths_own_numbers(finished: Any, tmp_path: Path) -> None:
    sample = draw_sample(finished.workspace, 1, 1000)
    assert len(sample.drawn) == len(finished.scores)
    path = written(tmp_path / "answers.json", sample, truthful(finished, sample))
    found = audit_answers(finished.workspace, path)["estimates"]
    known = audit(finished.workspace, 1, finished.truth)
    pairs = {
        ("all", "corpus_noise"): "corpus_noise",
        ("web", "corpus_noise"): "corpus_web_noise",
        ("synthetic", "corpus_noise"): "corpus_synthetic_noise",
        ("web", "candidate_noise"): "web_noise",
        ("synthetic", "candidate_noise"): "synthetic_noise",
        ("web", "filter_precision"): "filter_precision",
        ("web", "filter_recall"): "filter_recall",
    }
    for (source, name), key in pairs.items():
        assert list(found[source][name].values()) == pytest.approx([known[key]] * 3, abs=1e-6)


def test_a_sample_that_is_marked_truthfully_has_the_truth_in_its_intervals(finished: Any) -> None:
    known = audit(finished.workspace, 1, finished.truth)
    inside = []
    for seed in range(20):
        sample = draw_sample(finished.workspace, 1, 50, seed)
        marks = {int(number): mark for number, mark in truthful(finished, sample).items()}
        interval = estimates_of(sample, marks)["estimates"]["all"]["corpus_noise"]
        assert interval["low"] <= interval["value"] <= interval["high"]
        inside.append(interval["low"] - 1e-6 <= known["corpus_noise"] <= interval["high"] + 1e-6)
    assert np.mean(inside) >= 0.8


def test_the_estimates_are_stored_with_the_round(finished: Any, tmp_path: Path) -> None:
    sample = draw_sample(finished.workspace, 1, 40, seed=9)
    answers = truthful(finished, sample) | {"3": "unsure"}
    del answers["7"]
    found = audit_answers(finished.workspace, written(tmp_path / "answers.json", sample, answers))
    assert json.loads(finished.workspace.round(1).audit.read_text()) == found
    assert (found["sample"], found["round"], found["seed"], found["where"]) == (sample.name, 1, 9, "itm_score > 0.5")
    assert (found["drawn"], found["right"] + found["wrong"], found["unsure"]) == (40, 38, 1)
    assert sum(row["right"] + row["wrong"] + row["unsure"] for row in found["strata"]) == 39
    assert sum(row["drawn"] for row in found["strata"]) == 40
    assert set(found["estimates"]) == {"all", "web", "synthetic"}


def test_an_audit_of_a_round_in_a_store_is_that_of_a_folder(finished: Any, bucket: str, tmp_path: Path) -> None:
    fsspec.filesystem("s3").put(str(finished.workspace.root), f"{bucket}/work", recursive=True)
    remote = Workspace.existing(f"{bucket}/work")
    sample = draw_sample(finished.workspace, 1, 40)
    assert draw_sample(remote, 1, 40) == sample
    assert read_bytes(write_page(remote, sample)) == write_page(finished.workspace, sample).read_bytes()
    path = written(tmp_path / "answers.json", sample, truthful(finished, sample))
    fsspec.filesystem("s3").put(str(path), f"{bucket}/answers.json")
    found = audit_answers(remote, located(f"{bucket}/answers.json"))
    assert found == audit_answers(finished.workspace, path)
    assert read_json(remote.round(1).audit) == found


def test_an_unsure_pair_counts_as_if_it_had_not_been_marked(finished: Any) -> None:
    sample = draw_sample(finished.workspace, 1, 40)
    marks = {int(number): mark for number, mark in truthful(finished, sample).items()}
    fewer = {number: mark for number, mark in marks.items() if number > 4}
    unsure = fewer | dict.fromkeys(range(1, 5), "unsure")
    assert estimates_of(sample, unsure)["estimates"] == estimates_of(sample, fewer)["estimates"]


def test_a_source_or_verdict_of_which_nothing_is_marked_is_null(finished: Any) -> None:
    sample = draw_sample(finished.workspace, 1, 40)
    marks = {
        number: "wrong"
        for number, pair in enumerate(sample.drawn, 1)
        if sample.strata[pair.stratum].source == "web" and not sample.strata[pair.stratum].kept
    }
    found = estimates_of(sample, marks)["estimates"]
    assert found["synthetic"] == dict.fromkeys(found["synthetic"])
    assert found["web"]["corpus_noise"] is found["web"]["filter_recall"] is found["all"]["filter_precision"] is None
    assert found["web"]["candidate_noise"] is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sample": "0123456789abcdef"}, "0123456789abcdef"),
        ({"seed": 4}, "another"),
        ({"pairs": 41}, "another"),
        ({"schema": "answers/9"}, "answers/9"),
        ({"pairs": 0}, "pairs: must be a whole number of 1 to 10000, not 0"),
        ({"pairs": 10**9}, "pairs: must be"),
        ({"round": True}, "round: must be"),
        ({"seed": "1"}, "seed: must be a whole number"),
        ({"sample": 3}, "sample and answers must be"),
        ({"answers": ["right"]}, "sample and answers must be"),
        ({"answers": {"1": "good"}}, "'1': 'good' is not the number of a pair with one of right, wrong, unsure"),
        ({"answers": {"<b>": "right"}}, "'<b>'"),
        ({"answers": {"1": ["right"]}}, "'1'"),
        ({"answers": {"41": "right"}}, "there is no pair 41; the sample has 1 to 40"),
        ({"answers": {"0": "right"}}, "there is no pair 0"),
        ({"answers": {}}, "no pair is marked right or wrong"),
        ({"answers": {"1": "unsure"}}, "no pair is marked right or wrong"),
    ],
)
def test_answers_that_are_not_of_the_sample_are_refused_and_nothing_is_stored(
    changes: dict[str, Any], named: str, finished: Any, tmp_path: Path
) -> None:
    sample = draw_sample(finished.workspace, 1, 40)
    path = written(tmp_path / "answers.json", sample, {"1": "right"}, changes)
    with pytest.raises(InputError) as refusal:
        audit_answers(finished.workspace, path)
    assert named in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert not finished.workspace.round(1).audit.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b'"right"'])
def test_a_file_that_holds_no_answers_is_named(content: bytes, finished: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"answers\.json: not"):
        audit_answers(finished.workspace, path)
    with pytest.raises(InputError, match=r"none\.json"):
        audit_answers(finished.workspace, tmp_path / "none.json")


def test_answers_are_refused_when_the_round_was_published_anew_or_another_one_is_asked_for(
    finished: Any, tmp_path: Path
) -> None:
    sample = draw_sample(finished.workspace, 1, 40)
    path = written(tmp_path / "answers.json", sample, truthful(finished, sample))
    with pytest.raises(InputError, match="they are of round 1, not 2"):
        audit_answers(finished.workspace, path, round=2)
    paths = finished.workspace.round(1)
    (part,) = paths.annotations.iterdir()
    publish_shard(part, finished.workspace.shard(part.stem), paths.corpus / part.name, "itm_score > 0.6", 1)
    with pytest.raises(InputError, match="published anew"):
        audit_answers(finished.workspace, path, round=1)


def test_the_documented_keys_are_those_that_are_stored(finished: Any) -> None:
    sample = draw_sample(finished.workspace, 1, 40)
    found = estimates_of(sample, {1: "right", 2: "wrong"})
    document = (Path(__file__).parents[3] / "docs" / "workspace.md").read_text()
    section = document.split("## audit.json\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(found)
    (strata,) = re.findall(r"^\| `strata` \|(.*)", section, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", strata)) - {"itm_score"} == set(found["strata"][0])
