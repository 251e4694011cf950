"""`capfilt sweep` and `capfilt explain` on the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.data.shards import SHARD_SCHEMA
from blip_core.workspace import Workspace

Capfilt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def annotated(tmp_path: Path) -> Workspace:
    """Ten web texts of the scores 0.05, 0.15, ... in round 1, and the better half of them in round 2."""
    workspace = Workspace.open(tmp_path / "workspace")
    for number, first in ((1, 0), (2, 5)):
        rows = [
            {"uid": f"image-{place}", "shard": "aaaa", "url": f"http://web.test/{place}.jpg", "text": f"[b]{place}[/b]"}
            | {"source": "web", "candidate": 0, "itm_score": place / 10 + 0.05, "itc_score": 0.1}
            for place in range(first, 10)
        ]
        table = pa.Table.from_pylist(rows, ANNOTATION_SCHEMA)
        write_part(workspace.round(number).annotations / "aaaa.parquet", table, ANNOTATION_VERSION, "0" * 16)
    return workspace


def test_thresholds_and_predicates_are_swept_together(capfilt: Capfilt, annotated: Workspace) -> None:
    arguments = ("0.5", "itm_score < 0.3", "--workspace", str(annotated.root), "--round", "1", "--examples", "1")
    status, out, err = capfilt("sweep", *arguments, "--json")
    assert (status, err) == (0, "")
    first, second = json.loads(out)
    assert (first["where"], first["images"], first["web"], first["rejected"]) == ("itm_score > 0.5", 5, 5, 5)
    assert first["estimated_noise"] == pytest.approx(0.25)
    assert [pair["uid"] for pair in first["least_kept"] + first["most_rejected"]] == ["image-5", "image-4"]
    assert (second["images"], second["estimated_noise"]) == (3, pytest.approx(0.85))


def test_the_last_round_is_swept_by_default_over_some_thresholds(capfilt: Capfilt, annotated: Workspace) -> None:
    status, out, _ = capfilt("sweep", "--workspace", str(annotated.root), "--json")
    assert status == 0
    assert [row["images"] for row in json.loads(out)] == [5, 5, 5, 3, 1, 0, 0]


def test_people_see_a_table_and_the_pairs_at_the_edge_as_they_are(capfilt: Capfilt, annotated: Workspace) -> None:
    status, out, err = capfilt("sweep", "0.8", "--workspace", str(annotated.root))
    assert (status, err) == (0, "")
    assert "estimated noise" in out
    assert "itm_score > 0.8, kept last: 0.8500 web '[b]8[/b]' 'http://web.test/8.jpg'" in out
    assert "itm_score > 0.8, rejected first: 0.7500 web '[b]7[/b]' 'http://web.test/7.jpg'" in out


def test_an_image_is_explained_for_people_and_for_programs(capfilt: Capfilt, annotated: Workspace) -> None:
    image = {"uid": "image-7", "url": "http://web.test/7.jpg", "caption": "[b]7[/b]", "status": "ok", "sha256": "5a"}
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 32)
    table = pa.Table.from_pylist([image | sizes], SHARD_SCHEMA).replace_schema_metadata({"capfilt.schema": "shard/1"})
    annotated.shards.mkdir(exist_ok=True)
    pq.write_table(table, annotated.shard("aaaa"))
    status, out, err = capfilt("explain", "image-7", "--workspace", str(annotated.root))
    assert (status, err) == (0, "")
    assert "undecided web 0: '[b]7[/b]'" in out
    assert "its shard is not published in this round yet" in out
    status, out, _ = capfilt("explain", "image-7", "--workspace", str(annotated.root), "--json")
    assert [made["round"] for made in json.loads(out)["rounds"]] == [1, 2]
    status, out, err = capfilt("explain", "nobody", "--workspace", str(annotated.root))
    assert (status, out, len(err.splitlines())) == (1, "", 1)


@pytest.mark.parametrize(("given", "named"), [("itm_scor > 1", "itm_scor"), ("itm_score", "not true or false")])
def test_a_bad_predicate_gets_one_line(capfilt: Capfilt, annotated: Workspace, given: str, named: str) -> None:
    status, out, err = capfilt("sweep", given, "--workspace", str(annotated.root))
    (line,) = err.splitlines()
    assert (status, out) == (2, "")
    assert named in line


def test_a_sweep_asks_the_rules_of_a_configuration_and_says_which_it_does_not(
    capfilt: Capfilt, annotated: Workspace, tmp_path: Path
) -> None:
    rules = {"text": {"min_characters": 4}, "images": {"unique": True, "per_domain": 2}}
    values = {"workspace": str(annotated.root), "web": {"path": "urls.parquet"}, "publish": rules}
    path = tmp_path / "strict.yaml"
    path.write_text(json.dumps(values))
    arguments = ("sweep", "0.5", "--workspace", str(annotated.root), "--json", "--config", str(path))
    status, out, err = capfilt(*arguments)
    (row,) = json.loads(out)
    assert (status, row["web"]) == (0, 5)
    assert err.splitlines() == [
        "sweep: publishing may keep less, for publish.images.unique, publish.images.per_domain is not asked here"
    ]
    path.write_text(json.dumps(values | {"publish": {"text": {"min_characters": 9}}}))
    status, out, err = capfilt(*arguments)
    (row,) = json.loads(out)
    assert (status, row["web"], row["rejected"], err) == (0, 0, 5, "")
