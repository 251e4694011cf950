"""Rules that compare images, of one shard and of many, against a slow and obvious reading of what they promise."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from services.compared import WIDTH, Made, kept, make, publish, write_embeddings

from blip_core.corpus import left_out, near_duplicates
from blip_core.corpus.across import site_of
from blip_core.corpus.explain import explain
from blip_core.corpus.left_out import compare_round, part_of, read_left_out
from blip_core.corpus.rules import ImageRules, PublishConfig
from blip_core.errors import ShardError
from blip_core.files import fingerprint


def host_of(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host


def slow(made: Made, least: float, rules: ImageRules) -> tuple[set[tuple[str, str, int]], dict[tuple[str, str], str]]:
    """Goes through the images from the best one on, and keeps each that no kept one speaks against."""
    passing = [row for row in made.rows if row["itm_score"] > least]
    best: dict[tuple[str, str], dict] = {}
    for row in passing:
        image = (row["shard"], row["uid"])
        if image not in best or row["itm_score"] > best[image]["itm_score"]:
            best[image] = row
    order = sorted(best.values(), key=lambda row: (-row["itm_score"], row["uid"], row["shard"]))
    lost: dict[tuple[str, str], str] = {}
    for rule in ("same_image", "near_duplicate", "domain_full"):
        staying: list[dict] = []
        for row in [row for row in order if (row["shard"], row["uid"]) not in lost]:
            if speaks_against(made, rule, rules, staying, row):
                lost[row["shard"], row["uid"]] = rule
            else:
                staying.append(row)
    rows = {(row["shard"], row["uid"], row["candidate"]) for row in passing if (row["shard"], row["uid"]) not in lost}
    return rows, lost


def speaks_against(made: Made, rule: str, rules: ImageRules, staying: list[dict], row: dict) -> bool:
    if rule == "same_image":
        return rules.unique and any(row["image_sha256"] == other["image_sha256"] for other in staying)
    if rule == "near_duplicate" and rules.near_duplicates is not None:
        return any(cosine(made, row, other) >= rules.near_duplicates for other in staying)
    if rule == "domain_full" and rules.per_domain is not None:
        domain = host_of if rules.domain == "host" else lambda url: site_of(host_of(url))
        return sum(domain(row["url"]) == domain(other["url"]) for other in staying) >= rules.per_domain
    return False


def cosine(made: Made, row: dict, other: dict) -> float:
    left, right = (made.vectors[each["shard"], each["uid"]].astype(np.float64) for each in (row, other))
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


RULES = [
    ImageRules(unique=True),
    ImageRules(near_duplicates=0.98),
    ImageRules(per_domain=4),
    ImageRules(per_domain=4, domain="site"),
    ImageRules(unique=True, near_duplicates=0.9, per_domain=2),
]


@pytest.mark.parametrize("rules", RULES)
def test_what_is_kept_is_what_a_walk_from_the_best_image_on_keeps(rules: ImageRules, tmp_path: Path) -> None:
    made = make(tmp_path, seed=1)
    config = PublishConfig("itm_score > 0.35", images=rules)
    expected, lost = slow(made, 0.35, rules)
    assert set(lost.values()) == {
        reason
        for reason, asked in [
            ("same_image", rules.unique),
            ("near_duplicate", rules.near_duplicates),
            ("domain_full", rules.per_domain),
        ]
        if asked
    }
    publish(made, config)
    assert kept(made) == expected
    found = {
        (name, row["uid"]): row["reason"]
        for name in made.names
        for row in read_left_out(part_of(made.workspace.round(1), name)).to_pylist()
    }
    assert found == lost
    summary = compare_round(made.workspace, 1, made.names, config)
    assert (summary.skipped, summary.left_out) == (True, dict(sorted(Counter(lost.values()).items())))


def test_an_image_is_compared_by_the_texts_that_are_left_of_it_alone(tmp_path: Path) -> None:
    made = make(tmp_path, seed=2, shards=2)
    rules = ImageRules(unique=True)
    publish(made, PublishConfig("itm_score > 0.35 AND source = 'web'", images=rules))
    web = replace(made, rows=[row for row in made.rows if row["source"] == "web"])
    expected, _ = slow(web, 0.35, rules)
    assert kept(made) == expected


def test_the_bytes_do_not_depend_on_the_order_of_shards_nor_on_what_stood_before(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", seed=3), make(tmp_path / "other", seed=3)
    config = PublishConfig("itm_score > 0.2", images=RULES[-1])
    publish(one, config)
    other.names.reverse()
    publish(other, PublishConfig("itm_score > 0.5", images=RULES[0]))
    publish(other, config, names=sorted(other.names, key=lambda name: fingerprint(name)))
    for folder in ("left_out", "corpus"):
        first, second = (getattr(made.workspace.round(1), folder) for made in (one, other))
        assert {part.name: part.read_bytes() for part in first.iterdir()} == {
            part.name: part.read_bytes() for part in second.iterdir()
        }


def test_only_parts_whose_images_were_decided_otherwise_are_made_anew(tmp_path: Path) -> None:
    made = make(tmp_path, seed=4)
    config = PublishConfig("true", images=ImageRules(near_duplicates=0.98))
    publish(made, config)
    assert set(publish(made, config).values()) == {True}
    before = {name: read_left_out(part_of(made.workspace.round(1), name)) for name in made.names}
    first = made.names[0]
    own = sorted(uid for shard, uid in made.vectors if shard == first)
    lost = set(before[first]["uid"].to_pylist())
    made.vectors[first, next(uid for uid in own if uid in lost)] = np.eye(WIDTH, dtype=np.float16)[0]
    write_embeddings(made, first)
    skipped = publish(made, config)
    changed = {
        name for name in made.names if not before[name].equals(read_left_out(part_of(made.workspace.round(1), name)))
    }
    assert first in changed
    assert {name for name, stood in skipped.items() if not stood} == changed
    assert changed < set(made.names)


def test_parts_of_a_comparison_that_was_killed_are_not_mixed_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, whole = make(tmp_path / "killed", seed=5), make(tmp_path / "whole", seed=5)
    publish(made, PublishConfig("true", images=RULES[0]))
    write, written = left_out._write, []

    def write_two(part: Path, *arguments: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part)
        write(part, *arguments)  # type: ignore[arg-type]

    config = PublishConfig("true", images=ImageRules(unique=True, per_domain=3))
    with monkeypatch.context() as patch:
        patch.setattr(left_out, "_write", write_two)
        with pytest.raises(KeyboardInterrupt):
            publish(made, config)
    assert len(written) == 2
    publish(made, config)
    publish(whole, config)
    assert kept(made) == kept(whole)


def test_a_missing_embedding_or_annotation_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    made = make(tmp_path, seed=6, shards=2)
    config = PublishConfig("true", images=ImageRules(near_duplicates=0.9))
    part = made.workspace.round(1).embeddings / f"{made.names[1]}.parquet"
    table = pq.read_table(part)
    pq.write_table(table.slice(1), part)
    with pytest.raises(ShardError, match=rf"{made.names[1]}.*has no embedding of the image '{table['uid'][0]}'"):
        publish(made, config)
    part.unlink()
    with pytest.raises(ShardError, match=rf"embeddings.{made.names[1]}.*capfilt annotate makes it"):
        publish(made, config)
    assert not made.workspace.round(1).left_out.exists()


def test_explain_names_the_image_that_is_kept_in_the_place_of_another(tmp_path: Path) -> None:
    made = make(tmp_path, seed=7)
    publish(made, PublishConfig("itm_score > 0.2", images=RULES[-1]))
    told = Counter()
    for name in made.names:
        for row in read_left_out(part_of(made.workspace.round(1), name)).to_pylist():
            for candidate in explain(made.workspace, row["uid"])["rounds"][0]["candidates"]:
                if candidate["rejected_by"] == row["reason"] and candidate["shard"] == name:
                    told[row["reason"]] += 1
                    assert candidate["why"].startswith(f"{row['reason']}: ")
                    if row["of_uid"]:
                        assert f"{row['of_uid']!r} of shard {row['of_shard']}" in candidate["why"]
                        assert any((row["of_shard"], row["of_uid"]) == image[:2] for image in kept_or_lost(made))
    assert set(told) == {"same_image", "near_duplicate", "domain_full"}


def kept_or_lost(made: Made) -> set[tuple[str, str]]:
    """An image that stood for another may have lost against the next rule."""
    lost = ((name, read_left_out(part_of(made.workspace.round(1), name))["uid"].to_pylist()) for name in made.names)
    return {image[:2] for image in kept(made)} | {(name, uid) for name, uids in lost for uid in uids}


def vectors_of(seed: int, count: int, width: int) -> np.ndarray:
    """Around a common direction, as models place images; many close to an earlier one, some in chains."""
    noise = np.random.default_rng(seed)
    rows = noise.standard_normal((count, width)) + 0.7 * noise.standard_normal(width)
    for place in noise.choice(np.arange(1, count), count // 2, replace=False):
        rows[place] = rows[noise.integers(place)] + noise.uniform(0, 0.6) * noise.standard_normal(width)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def walk(vectors: np.ndarray, threshold: float) -> list[int]:
    """The places that are kept by a walk from the first on."""
    rows = vectors.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines, staying = rows @ rows.T, []
    for place in range(len(rows)):
        if not any(cosines[place, other] >= threshold for other in staying):
            staying.append(place)
    return staying


def staying(vectors: np.ndarray, threshold: float) -> list[int]:
    """The places that are kept; each other one is said to look like one of them that comes before it."""
    found = near_duplicates.leaders(vectors, threshold)
    rows = vectors.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    lost = np.flatnonzero(found != np.arange(len(found)))
    assert (found[found] == found).all()
    assert (found <= np.arange(len(found))).all()
    assert (np.einsum("ij,ij->i", rows[lost], rows[found[lost]]) >= threshold - 1e-14).all()
    return np.flatnonzero(found == np.arange(len(found))).tolist()


@pytest.mark.parametrize("threshold", [0.7, 0.85, 0.95, 0.99])
def test_those_that_stay_are_those_of_a_walk_whatever_the_blocks(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "QUERY_ROWS", 37)
    monkeypatch.setattr(near_duplicates, "POOL_ROWS", 101)
    vectors = vectors_of(0, 700, 32)
    assert staying(vectors, threshold) == walk(vectors, threshold)


@pytest.mark.parametrize("pairs", [1, 5, 2**16])
def test_cosines_at_the_threshold_itself_are_decided_without_rounding(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "PAIRS", pairs)
    vectors = vectors_of(1, 300, 32)
    rows = vectors.astype(np.float64)
    cosines = (rows @ rows.T) / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
    for threshold in np.sort(cosines[np.triu_indices(len(rows), 1)])[-5:]:
        assert staying(vectors, float(threshold) - 1e-12) == walk(vectors, threshold - 1e-12)
        assert staying(vectors, float(threshold) + 1e-12) == walk(vectors, threshold + 1e-12)


@pytest.mark.parametrize("threshold", [0.85, 0.95])
def test_hyperplanes_find_nearly_all_that_looks_the_same_and_nothing_that_does_not(threshold: float) -> None:
    vectors = vectors_of(2, 3000, 64)
    found = near_duplicates.leaders(vectors, threshold, near_duplicates.by_hyperplanes)
    rows = vectors.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    places = np.arange(len(rows))
    lost = places[found != places]
    assert (found[found] == found).all()  # each one looks like one that is kept
    assert (np.einsum("ij,ij->i", rows[lost], rows[found[lost]]) >= threshold).all()
    left = rows[found == places]
    missed = int(np.triu(left @ left.T >= threshold, 1).sum())
    assert missed <= 0.02 * (len(rows) - len(walk(vectors, threshold)))
    assert (near_duplicates.leaders(vectors, threshold, near_duplicates.by_hyperplanes) == found).all()


@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.99])
def test_as_many_hyperplanes_are_drawn_as_find_a_pair_at_the_threshold(threshold: float) -> None:
    draws = near_duplicates.best_draws(vectors_of(3, 2000, 32), np.arange(2000), threshold)
    same_side = 1 - np.arccos(threshold) / np.pi
    assert 1 - (1 - same_side**draws.bits) ** draws.times >= near_duplicates.RECALL


@pytest.mark.parametrize(
    ("host", "site"),
    [
        ("a.b.example.co.uk", "example.co.uk"),
        ("example.com.", "example.com"),
        ("co.uk", "co.uk"),
        ("10.1.2.3", "10.1.2.3"),
        ("[2001:db8::1]", "[2001:db8::1]"),
        ("localhost", "localhost"),
        ("", ""),
    ],
)
def test_the_site_of_a_host_is_its_registered_name(host: str, site: str) -> None:
    assert site_of(host) == site


def test_images_without_any_text_left_are_not_compared(tmp_path: Path) -> None:
    made = make(tmp_path, seed=8, shards=2)
    summary = compare_round(made.workspace, 1, made.names, PublishConfig("false", images=RULES[-1]))
    assert (summary.images, summary.left_out) == (0, {})


def count_calls(function: Callable[..., object], calls: list[object]) -> Callable[..., object]:
    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return function(*arguments)

    return counted


def test_a_comparison_that_stands_judges_no_candidate_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = make(tmp_path, seed=9, shards=2), []
    monkeypatch.setattr(left_out, "judge_alone", count_calls(left_out.judge_alone, calls))
    for config, judged in ((RULES[0], 2), (RULES[0], 2), (RULES[1], 4)):
        compare_round(made.workspace, 1, made.names, PublishConfig("true", images=config))
        assert len(calls) == judged
