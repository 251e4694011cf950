"""A run that is killed at any step, and started again, ends with the corpus of an unbroken run."""

import os
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

TINY = Path(__file__).parents[1] / "orchestration" / "tiny.yaml"

Start = Callable[..., subprocess.Popen[str]]
Ends = Callable[[subprocess.Popen[str]], None]

# In the order in which a run comes by: what must be on disk for the run to be killed there.
MOMENTS: dict[str, Callable[[Workspace, Round], bool]] = {
    "first shard": lambda workspace, _: any(workspace.shards.glob("*.parquet")),
    "amid pre-training": lambda _, made: any((made.root / ".med.training").glob("*/state.json")),
    "MED": lambda _, made: (made.med / "config.json").exists(),
    "Captioner": lambda _, made: (made.captioner / "config.json").exists(),
    "first annotation part": lambda _, made: any(made.annotations.glob("*.parquet")),
    "first corpus part": lambda _, made: any(made.corpus.glob("*.parquet")),
    "amid retraining": lambda _, made: any((made.root / ".retrained.training").glob("*/state.json")),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration for a synthetic web of two shards that is served outside the killed processes."""
    folder = tmp_path_factory.mktemp("chaos")
    scenes = ScenesConfig(
        web_images=120, human_pairs=40, held_out=12, dead_links=3, non_images=1, truncated=1, oversized=1, duplicates=2
    )
    paths = make_scenes(folder / "web", scenes)
    with serve_scenes(paths.folder) as address:
        values = yaml.safe_load(TINY.read_text()) | {
            "workspace": "set by the test",
            "download": {
                "rows_per_shard": 70,
                "image_size": 64,
                "processes": 1,
                "threads": 8,
                "allow_private_networks": True,
            },
            "web": {"path": str(url_table(paths, address, folder / "urls.parquet")), "caption": "alt", "uid": "uid"},
            "human": {"path": str(paths.human), "uid": "uid"},
            "held_out": {"path": str(paths.held_out), "uid": "uid"},
            "truth": str(paths.truth),
        }
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        yield path


def parts_of(workspace: Workspace) -> dict[str, tuple[int, int, int]]:
    """What stands under a final name, with inode, size and time of writing."""
    made = workspace.round(1)
    folders = (workspace.shards, made.annotations, made.embeddings, made.corpus, made.med, made.captioner, made.filter)
    files = [
        path
        for folder in (*folders, made.retrained, made.retrained_raw)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    ]
    states = {path: path.stat() for path in files}
    return {
        str(path.relative_to(workspace.root)): (state.st_ino, state.st_size, state.st_mtime_ns)
        for path, state in states.items()
    }


def corpus_rows(workspace: Workspace) -> pa.Table:
    parts = sorted(workspace.round(1).corpus.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(part).replace_schema_metadata() for part in parts])


def test_a_run_killed_at_every_step_ends_as_an_unbroken_one_and_makes_nothing_twice(
    config: Path, start: Start, ends_well: Ends, wait_until: Callable[..., bool], tmp_path: Path
) -> None:
    broken, unbroken = Workspace(tmp_path / "broken"), Workspace(tmp_path / "unbroken")
    steady = start("bootstrap", config, "--workspace", unbroken.root)
    killed = []
    for moment, reached in MOMENTS.items():
        if reached(broken, broken.round(1)):
            continue  # two moments that lie close together were passed at once
        before = parts_of(broken)
        process = start("bootstrap", config, "--workspace", broken.root)
        arrived = wait_until(lambda reached=reached: reached(broken, broken.round(1)), process)
        assert arrived, f"{moment}: {process.communicate()[0]}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed.append(moment)
        after = parts_of(broken)
        assert {name: after.get(name) for name in before} == before, f"written again before the kill at: {moment}"
    assert len(killed) >= 5
    before = parts_of(broken)
    ends_well(start("bootstrap", config, "--workspace", broken.root))
    assert {name: parts_of(broken)[name] for name in before} == before
    ends_well(steady)
    assert corpus_rows(broken).num_rows > 0
    assert corpus_rows(broken).equals(corpus_rows(unbroken))
    assert sorted(parts_of(broken)) == sorted(parts_of(unbroken))
