"""What is forgotten of a round whose images were compared: no part names it, and whoever lost against it comes back."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from services.compared import Made, kept, make, publish

from blip_core.corpus.forget import forget
from blip_core.corpus.left_out import part_of, read_left_out
from blip_core.corpus.names import parse_names
from blip_core.corpus.rules import ImageRules, PublishConfig
from blip_core.corpus.selection import REJECTED_KEY, REJECTIONS_KEY
from blip_core.data.shards import read_shard
from blip_core.workspace import Workspace

CONFIG = PublishConfig("itm_score > 0.2", images=ImageRules(unique=True, near_duplicates=0.95, per_domain=9))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = make(tmp_path / "work", seed=3)
    publish(made, CONFIG)
    return made


def leader_of_another_shard(made: Made) -> tuple[str, str]:
    """Shard and uid of an image that one of another shard has lost against, as a near duplicate."""
    rows = [
        row | {"shard": name}
        for name in made.names
        for row in read_left_out(part_of(made.workspace.round(1), name)).to_pylist()
    ]
    found = [row for row in rows if row["reason"] == "near_duplicate" and row["of_shard"] != row["shard"]]
    return found[0]["of_shard"], found[0]["of_uid"]


def forget_image(made: Made, shard: str, uid: str) -> set[str]:
    """Forgets an image by its bytes; returns the uids of all rows that had them."""
    (digest,) = (row["sha256"] for row in read_shard(made.workspace.shard(shard)).to_pylist() if row["uid"] == uid)
    gone = {row["uid"] for row in made.rows if row["image_sha256"] == digest}
    forget(made.workspace, parse_names([digest]))
    return gone


def words_of(path: Path) -> set[str]:
    table = pq.read_table(path, partitioning=None)
    return {value for column in ("uid", "of_uid") for value in table[column].to_pylist() if value}


def test_no_part_names_it_and_the_others_are_told_as_before(made: Made) -> None:
    parts = {name: part_of(made.workspace.round(1), name) for name in made.names}
    before = {name: read_left_out(part).to_pylist() for name, part in parts.items()}
    shard, uid = leader_of_another_shard(made)
    gone = forget_image(made, shard, uid)
    for name, part in parts.items():
        assert not words_of(part) & gone
        left = [row for row in before[name] if row["uid"] not in gone]
        expected = [row | dict.fromkeys(("of_shard", "of_uid")) if row["of_uid"] in gone else row for row in left]
        assert read_left_out(part).to_pylist() == expected


def test_the_next_publication_is_as_if_it_were_the_first(made: Made, tmp_path: Path) -> None:
    shard, uid = leader_of_another_shard(made)
    before = kept(made)
    gone = forget_image(made, shard, uid)
    publish_anew(made)
    first = replace(made, workspace=Workspace.open(tmp_path / "first"))
    shutil.copytree(made.workspace.root, first.workspace.root, dirs_exist_ok=True)
    for folder in (first.workspace.round(1).corpus, first.workspace.round(1).left_out):
        shutil.rmtree(folder)
    publish_anew(first)
    assert kept(made) == kept(first)
    assert kept(made) - before  # some that had lost against it
    assert not {row[1] for row in kept(made)} & gone


def publish_anew(made: Made) -> None:
    rows = [row for row in made.rows if row["uid"] in images_of(made.workspace)]
    publish(replace(made, rows=rows), CONFIG)


def images_of(workspace: Workspace) -> set[str]:
    return {row["uid"] for path in workspace.shard_paths() for row in read_shard(path).to_pylist() if row["url"]}


def test_what_is_rejected_is_counted_without_it_by_reason(made: Made) -> None:
    shard, uid = leader_of_another_shard(made)
    gone = forget_image(made, shard, uid)
    for name in made.names:
        metadata = pq.read_metadata(made.workspace.round(1).corpus / f"{name}.parquet").metadata
        rows = [row for row in made.rows if row["shard"] == name and row["uid"] not in gone]
        rejected = [row for row in rows if (name, row["uid"], row["candidate"]) not in kept(made)]
        reasons = Counter(json.loads(metadata[REJECTIONS_KEY.encode()]))
        assert reasons.total() == int(metadata[REJECTED_KEY.encode()]) == len(rejected)
        assert reasons["where"] == sum(row["itm_score"] <= 0.2 for row in rejected)
