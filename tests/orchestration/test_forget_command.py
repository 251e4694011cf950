"""`capfilt forget`: what goes is told first, then gone; pages are made anew; a run under way is left alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from services.rounds import make_round

from blip_core.data.shards import read_shard
from blip_core.evaluation.card import write_card
from blip_core.evaluation.report import write_report
from blip_core.workspace import Workspace
from flows.server import only_one

Capfilt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = make_round(tmp_path / "work", [f"text number {number}" for number in range(20)])
    write_report(made, 1)
    write_card(made, 1)
    return made


def urls(workspace: Workspace) -> list[str]:
    return [url for path in workspace.shard_paths() for url in read_shard(path)["url"].to_pylist() if url]


def test_a_dry_run_says_what_would_go_and_the_run_says_that_it_went(capfilt: Capfilt, workspace: Workspace) -> None:
    (url, *others), place = urls(workspace), ("--workspace", str(workspace.root))
    status, out, _ = capfilt("forget", url, *place, "--dry-run")
    assert status == 0
    assert out.startswith("would remove: 1 rows of 1 shards, 1 images")
    assert url in urls(workspace)
    status, out, err = capfilt("forget", url, *place)
    assert status == 0
    assert out.splitlines() == [
        "removed: 1 rows of 1 shards, 1 images, 1 annotations, 0 embeddings, 0 texts of corpora, 0 human pairs, "
        "0 plans",
        "removed: rounds/0001/corpus/README.md; made anew without it",
        "removed: rounds/0001/report.html; made anew without it",
    ]
    assert "docs/forgetting.md" in err
    assert urls(workspace) == others
    for page in (workspace.round(1).report, workspace.round(1).corpus / "README.md"):
        assert page.is_file()
        assert "text number 0<" not in page.read_text()


def test_names_come_from_a_list_as_well_and_the_result_is_json(
    capfilt: Capfilt, workspace: Workspace, tmp_path: Path
) -> None:
    *others, first, second = urls(workspace)
    (tmp_path / "list.txt").write_text(f"# wanted by their owner\n{second}\n")
    arguments = (first, "--file", str(tmp_path / "list.txt"), "--workspace", str(workspace.root), "--json")
    status, out, _ = capfilt("forget", *arguments)
    found = json.loads(out)
    assert status == 0
    assert (found["rows"], found["rounds"], found["checkpoints"]) == (2, [1], [])
    assert found["denied"]["urls"] == 2
    assert urls(workspace) == others
    (part,) = workspace.round(1).corpus.glob("*.parquet")
    assert pq.read_table(part)["uid"].to_pylist() == [f"{number:08d}" for number in range(10, 18)]


def test_what_cannot_be_forgotten_gets_one_line(capfilt: Capfilt, workspace: Workspace, tmp_path: Path) -> None:
    place = ("--workspace", str(workspace.root))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for arguments, expected, named in (
        (("nonsense", *place), 2, "'nonsense'"),
        (("--file", str(tmp_path / "empty.txt"), *place), 2, "names nothing"),
        (("--file", str(tmp_path / "none.txt"), *place), 1, "none.txt"),
        (("a.test", "--workspace", str(tmp_path / "nowhere")), 1, "nowhere"),
    ):
        status, out, err = capfilt("forget", *arguments)
        assert (status, out, err.count("\n")) == (expected, "", 1)
        assert named in err
    assert not workspace.denied.exists()


def test_while_a_run_is_at_work_nothing_is_forgotten(capfilt: Capfilt, workspace: Workspace) -> None:
    before = urls(workspace)
    with only_one(workspace):
        status, _, err = capfilt("forget", before[0], "--workspace", str(workspace.root))
    assert (status, err.count("\n")) == (1, 1)
    assert "another capfilt run is at work" in err
    assert urls(workspace) == before
    assert not workspace.denied.exists()
