"""`capfilt clean` with published models, killed at any moment and started again, ends as an unbroken run.

The process alone is killed, as the kernel kills what takes too much memory: its children must end by themselves.
"""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from blip_core.scenes.server import serve_scenes
from blip_core.scenes.web import ScenesConfig, make_scenes, url_table
from blip_core.workspace import Round, Workspace

ROWS_PER_SHARD, CANDIDATES = 30, 4
SECONDS = 120

Start = Callable[..., subprocess.Popen[str]]
Ends = Callable[[subprocess.Popen[str]], None]

# In the order in which a run comes by: what must be on disk for the run to be killed there.
MOMENTS: dict[str, Callable[[Workspace, Round], bool]] = {
    "amid the first download": lambda workspace, _: any(workspace.root.glob(".tmp/*/*/output/*/*.jpg")),
    "first shard": lambda workspace, _: any(workspace.shards.glob("*.parquet")),
    "amid annotating the first shard": lambda _, made: any(made.annotations.glob(".*.tmp")),
    "first annotation part": lambda _, made: any(made.annotations.glob("*.parquet")),
    "amid annotating a later shard": lambda _, made: (
        len([*made.annotations.glob("*.parquet")]) >= 3 and any(made.annotations.glob(".*.tmp"))
    ),
    "amid publishing": lambda _, made: any(made.corpus.glob("*")),
}


@pytest.fixture(scope="module")
def config(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration of published models for a synthetic web that is served outside the killed processes."""
    folder = tmp_path_factory.mktemp("chaos")
    scenes = ScenesConfig(
        web_images=120, human_pairs=1, held_out=1, dead_links=3, non_images=1, truncated=1, oversized=1, duplicates=2
    )
    paths = make_scenes(folder / "web", scenes)
    with serve_scenes(paths.folder) as address:
        values = {
            "workspace": "set by the test",
            "web": {"path": str(url_table(paths, address, folder / "urls.parquet")), "caption": "alt", "uid": "uid"},
            "checkpoints": {"captioner": str(published / "captioner"), "filter": str(published / "filter")},
            "download": {
                "rows_per_shard": ROWS_PER_SHARD,
                "image_size": 64,
                "processes": 1,
                "threads": 8,
                "allow_private_networks": True,
            },
            "annotate": {"candidates": CANDIDATES, "batch_size": 3, "workers": 1},
        }
        path = folder / "clean.yaml"
        path.write_text(yaml.safe_dump(values))
        yield path


def parts_of(workspace: Workspace) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of writing of what stands under a final name."""
    made = workspace.round(1)
    return {
        str(path.relative_to(workspace.root)): (state.st_ino, state.st_size, state.st_mtime_ns)
        for folder in (workspace.shards, made.annotations, made.embeddings, made.corpus)
        for path in folder.glob("[!.]*")
        if (state := path.stat())
    }


def left_behind(workspace: Workspace) -> list[Path]:
    """What lies under a temporary name, or in a folder of such a name."""
    return [
        path
        for path in workspace.root.rglob("*")
        if (path.name.endswith(".tmp") and path.name != ".tmp") or path.parent.name in (".tmp", ".plans")
    ]


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(part).replace_schema_metadata() for part in sorted(folder.glob("*.parquet"))]
    )


def test_a_clean_that_is_killed_at_every_moment_loses_and_doubles_no_row(
    config: Path, start: Start, ends_well: Ends, wait_until: Callable[..., bool], tmp_path: Path
) -> None:
    broken, unbroken = Workspace(tmp_path / "broken"), Workspace(tmp_path / "unbroken")
    killed = []
    for moment, reached in MOMENTS.items():
        if reached(broken, broken.round(1)):
            continue  # the kill before came a moment too late, and passed this one as well
        before = parts_of(broken)
        process = start("clean", config, "--json", "--workspace", broken.root)
        arrived = wait_until(lambda reached=reached: reached(broken, broken.round(1)), process)
        assert arrived, f"{moment}: {process.communicate()[0]}"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=SECONDS)  # ends when the last process that writes to its output has ended
        killed.append(moment)
        after = parts_of(broken)
        assert {name: after.get(name) for name in before} == before, f"written again before the kill at: {moment}"
    assert {"amid the first download", "first shard", "amid annotating the first shard"} <= {*killed}
    assert len(killed) >= 5
    standing = parts_of(broken)
    ends_well(start("clean", config, "--json", "--workspace", broken.root))
    ends_well(start("clean", config, "--json", "--workspace", unbroken.root))
    assert {name: parts_of(broken)[name] for name in standing} == standing
    assert sorted(parts_of(broken)) == sorted(parts_of(unbroken))
    uids = pq.read_table(yaml.safe_load(config.read_text())["web"]["path"])["uid"].to_pylist()
    assert len(parts_of(broken)) == 4 * -(-len(uids) // ROWS_PER_SHARD) + 1  # the corpus's card
    check_rows(broken, unbroken, uids)
    assert left_behind(broken) == []


def check_rows(broken: Workspace, unbroken: Workspace, uids: list[str]) -> None:
    """Every row of the table is there once, with every candidate of every image, as in the unbroken run."""
    made, expected = broken.round(1), unbroken.round(1)
    images = rows_of(broken.shards)
    assert sorted(images["uid"].to_pylist()) == sorted(uids)
    annotations = rows_of(made.annotations)
    keys = set(zip(annotations["uid"].to_pylist(), annotations["candidate"].to_pylist(), strict=True))
    ok = images["status"].to_pylist().count("ok")
    assert len(keys) == annotations.num_rows == ok * (1 + CANDIDATES)
    assert annotations.equals(rows_of(expected.annotations))
    corpus = rows_of(made.corpus)
    assert 0 < corpus.num_rows < annotations.num_rows
    assert corpus.equals(rows_of(expected.corpus))


def test_a_run_that_is_done_does_nothing_again(config: Path, start: Start, ends_well: Ends, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "twice")
    ends_well(start("clean", config, "--json", "--workspace", workspace.root))
    before = parts_of(workspace)
    ends_well(start("clean", config, "--json", "--workspace", workspace.root))
    assert parts_of(workspace) == before
    assert left_behind(workspace) == []
