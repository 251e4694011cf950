"""The whole cycle in an object store: the same rows as in a folder, nothing made twice, and the questions after it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import duckdb
import fsspec
import pyarrow.parquet as pq
import pytest
import yaml
from services.prefect import Server
from services.s3 import S3

from blip_core.workspace import Round, Workspace

TINY = Path(__file__).with_name("tiny.yaml")
SECONDS = 600
pytestmark = pytest.mark.timeout(4 * SECONDS)
BUCKET = "capfilt"
# What is written without anything having been made: the views, and whether the workspace can be written to.
ALWAYS_PUT = ("catalog.duckdb", ".probe")

Start = Callable[..., subprocess.Popen[str]]

# In the order in which a run comes by: what must be in the store for the run to be killed there.
MOMENTS: dict[str, Callable[[Workspace, Round], bool]] = {
    "amid pre-training": lambda _, made: any((made.root / ".med.training").glob("*/state.json")),
    "first annotation part": lambda _, made: any(made.annotations.glob("*.parquet")),
}


@pytest.fixture(scope="module")
def start(store: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a command in a process group of its own; the runs have one Prefect server, which no kill reaches."""
    fsspec.filesystem("s3").mkdir(BUCKET)
    with Server(tmp_path_factory.mktemp("prefect")) as server:
        server.start()

        processes: list[subprocess.Popen[str]] = []

        def started(*words: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows", *map(str, words)],
                env=server.client | store.variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            processes.append(process)
            return process

        yield started
        for process in processes:  # those of a test that failed
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def config(tiny_web: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of the tiny web, whose workspace is for the runs to name."""
    values = yaml.safe_load(TINY.read_text()) | {
        "workspace": "named by the run",
        "web": {"path": str(tiny_web / "urls.parquet"), "caption": "alt", "uid": "uid"},
        "human": {"path": str(tiny_web / "human.parquet")},
        "held_out": {"path": str(tiny_web / "held_out.parquet")},
        "truth": str(tiny_web / "truth.parquet"),
    }
    path = tmp_path_factory.mktemp("remote") / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def answer(process: subprocess.Popen[str]) -> str:
    """What a command printed that ends well."""
    output, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    return output


@pytest.fixture(scope="module")
def folder(start: Start, config: Path) -> Workspace:
    """A round that was made in a folder of this machine."""
    root = config.parent / "folder"
    answer(start("bootstrap", config, "--workspace", root))
    return Workspace.existing(root)


@pytest.fixture(scope="module")
def stored(start: Start, config: Path) -> Workspace:
    """The same round, made in the store."""
    root = f"s3://{BUCKET}/made"
    answer(start("bootstrap", config, "--workspace", root))
    return Workspace.existing(root)


def parts_of(workspace: Workspace) -> dict[str, bytes]:
    """The bytes of every Parquet part, by its name from the root."""
    made = workspace.round(1)
    return {
        f"{folder.name}/{path.name}": path.read_bytes()
        for folder in (workspace.shards, made.annotations, made.embeddings, made.corpus)
        for path in folder.glob("*.parquet")
    }


def states_of(workspace: Workspace) -> dict[str, tuple[str, str]]:
    """Content and time of writing of every object of the workspace, as a client of its own lists them."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    found = fs.find(str(workspace.root), detail=True)
    return {
        name: (info["ETag"], str(info["LastModified"])) for name, info in found.items() if not name.endswith(ALWAYS_PUT)
    }


def test_the_parts_in_the_store_are_those_in_a_folder_byte_for_byte(folder: Workspace, stored: Workspace) -> None:
    local, remote = parts_of(folder), parts_of(stored)
    assert len(local) == 4 * 2 + 1
    assert remote == local


def test_the_store_holds_what_the_folder_does_and_nothing_under_way(folder: Workspace, stored: Workspace) -> None:
    local = {str(path.relative_to(folder.root)) for path in folder.root.rglob("*") if path.is_file()}
    remote = {name.removeprefix(f"{BUCKET}/made/") for name in states_of(stored)} | {"catalog.duckdb"}
    assert remote == local


def test_a_second_run_makes_nothing_anew_and_asks_little(
    stored: Workspace, start: Start, config: Path, store: S3
) -> None:
    before, seen = states_of(stored), len(store.requests())
    answer(start("bootstrap", config, "--workspace", stored.root))
    requests = [line.split()[:2] for line in store.requests()[seen:]]
    puts = [path for method, path in requests if method == "PUT"]
    assert states_of(stored) == before
    assert [path for path in puts if not any(name in path for name in ALWAYS_PUT)] == []
    assert len(requests) < 1000


def test_a_run_that_is_killed_in_the_store_and_run_again_ends_as_an_unbroken_one(
    folder: Workspace, start: Start, config: Path
) -> None:
    broken = Workspace.open(f"s3://{BUCKET}/broken")
    killed = []
    for moment, reached in MOMENTS.items():
        if reached(broken, broken.round(1)):
            continue  # two moments that lie close together were passed at once
        before = parts_of(broken)
        process = start("bootstrap", config, "--workspace", broken.root)
        deadline = time.monotonic() + SECONDS
        while not reached(broken, broken.round(1)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert reached(broken, broken.round(1)), moment
        killed.append(moment)
        assert before.items() <= parts_of(broken).items()
    assert killed
    answer(start("bootstrap", config, "--workspace", broken.root))
    assert parts_of(broken) == parts_of(folder)


def test_questions_and_report_of_the_round_in_the_store_are_those_of_the_folder(
    folder: Workspace, stored: Workspace, start: Start
) -> None:
    sql = "SELECT source, count(*) AS n, avg(itm_score) AS s FROM corpus JOIN images USING (uid) GROUP BY 1 ORDER BY 1"
    reports = []
    for workspace in (folder, stored):
        rows = json.loads(answer(start("query", "--workspace", workspace.root, sql, "--json")))
        report = json.loads(answer(start("report", workspace.root, "--json")))
        rounds = json.loads(answer(start("rounds", "--workspace", workspace.root, "--json")))
        reports.append((rows, {**report, "seconds": None, "images_per_second": None}, rounds))
    assert reports[0] == reports[1]
    assert answer(start("report", stored.root)).strip() == str(stored.round(1).report)
    assert "data:image/" in stored.round(1).report.read_text()


def test_the_catalog_in_the_store_answers_whoever_brings_a_client_of_the_store(
    stored: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "catalog.duckdb").write_bytes(stored.catalog.read_bytes())
    with duckdb.connect(tmp_path / "catalog.duckdb", read_only=True) as connection:
        connection.register_filesystem(fsspec.filesystem("s3"))
        [(rows,)] = connection.sql("SELECT count(*) FROM corpus").fetchall()
    expected = [
        pq.read_metadata(fsspec.open(str(part)).open()).num_rows for part in stored.round(1).corpus.glob("*.parquet")
    ]
    assert rows == sum(expected) > 0
