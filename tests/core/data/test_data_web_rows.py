"""A table of many files, streamed: the rows and the shards are those of a plain program that holds everything."""

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.data import sorting, table_formats
from blip_core.data.cutting import DownloadPlan
from blip_core.data.download import DownloadConfig, plan_shards, preview_plan, settings_hash
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.data.tables import WebTable
from blip_core.data.web_rows import open_web_table, read_web_table
from blip_core.errors import InputError
from blip_core.files import fingerprint
from blip_core.workspace import Workspace

CONFIG = DownloadConfig(rows_per_shard=7)
MEGABYTE = 2**20

Row = dict[str, Any]


def rows_of(seed: int, count: int, alphabet: int = 9) -> list[Row]:
    """Rows of which many repeat others, some without a URL or a text."""
    draw = random.Random(seed)
    letters = [None, "", *(f"http://web.test/é{number}.jpg" for number in range(alphabet))]
    texts = [None, "", 'a "red" bus,\nor two', "\u2028 line", *(f"text {number}" for number in range(alphabet))]
    return [{"url": draw.choice(letters), "caption": draw.choice(texts)} for _ in range(count)]


def obvious_rows(rows: list[Row], uid: str | None = None) -> list[Row]:
    """uid, url, caption and duplicate of every row, in the order of uid."""
    seen: Counter[tuple[str, str]] = Counter()
    result = []
    for row in rows:
        url, caption = row["url"], row["caption"] or ""
        occurrence = seen[url or "", caption]
        seen[url or "", caption] += 1
        digest = hashlib.sha256("\0".join([url or "", caption, str(occurrence)]).encode()).hexdigest()[:20]
        found = {"uid": str(row[uid]) if uid else digest, "url": url, "caption": caption}
        result.append(found | {"duplicate": occurrence > 0 and not uid})
    return sorted(result, key=lambda row: row["uid"])


def obvious_plan(rows: list[Row], uids: dict[str, str], urls: dict[str, str]) -> tuple[DownloadPlan, list[list[Row]]]:
    """The plan, and the rows of its shards, where these uids and URLs stand in shards of these names."""
    new = [row for row in rows if row["uid"] not in uids]
    left = [row for row in new if not row["url"] or row["url"].strip() not in urls]
    done = {uids[row["uid"]] for row in rows if row["uid"] in uids}
    done |= {urls[row["url"].strip()] for row in new if row["url"] and row["url"].strip() in urls}
    cuts = [left[start : start + CONFIG.rows_per_shard] for start in range(0, len(left), CONFIG.rows_per_shard)]
    names = [
        fingerprint(settings_hash(CONFIG), *([row[key] for row in cut] for key in ("uid", "url", "caption")))
        for cut in cuts
    ]
    return DownloadPlan(sorted(names), sorted(done), len(rows), len(left), len(new) - len(left)), cuts


def write(path: Path, rows: list[Row]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, pa.schema({"url": pa.string(), "caption": pa.string()})), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["url", "caption"])
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sorts in runs of a few rows; returns the folder that they lie in."""
    monkeypatch.setattr(sorting, "BLOCK_BYTES", 300)
    monkeypatch.setattr(sorting, "RUN_BYTES", 1000)
    monkeypatch.setattr(table_formats, "ROWS_AT_ONCE", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "capfilt" / "sorting"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("files", [1, 5])
def test_rows_sorted_in_many_runs_are_those_of_a_plain_sort(
    small_runs: Path, tmp_path: Path, seed: int, files: int
) -> None:
    rows = rows_of(seed, 400, alphabet=9 if seed % 2 else 60)
    size = -(-len(rows) // files)
    for number in range(files):
        write(tmp_path / f"part-{number}.parquet", rows[number * size : (number + 1) * size])
    table = WebTable(str(tmp_path / "part-*.parquet"))
    with open_web_table(table) as found:
        assert len(list(small_runs.glob("*/*.arrow"))) > 5
        assert (found.rows, found.all_rows) == (400, 400)
        for _ in range(2):
            assert [row for batch in found.batches() for row in batch.to_pylist()] == obvious_rows(rows)
    assert list(small_runs.iterdir()) == []
    assert read_web_table(replace(table, limit=33)).to_pylist() == obvious_rows(rows)[:33]


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_that_of_a_program_that_holds_the_table(small_runs: Path, tmp_path: Path, seed: int) -> None:
    rows = rows_of(seed, 200, alphabet=30)
    write(tmp_path / "urls.parquet", rows)
    web, workspace = WebTable(str(tmp_path / "urls.parquet")), Workspace.open(tmp_path / "work")
    expected = obvious_rows(rows)
    stands, earlier = expected[10:17] + expected[90:97], [row for row in expected if row["url"]][::40]
    uids = put_shard(workspace, "aa", stands, settings_hash(CONFIG), "uid")
    put_shard(workspace, "bb", expected[50:60], "of other settings", "uid")
    urls = put_shard(workspace, "cc", [{**row, "url": f" {row['url']}\n"} for row in earlier], "other", "url")
    for before, known in ((["cc"], urls), ([], {})):
        plan, cuts = obvious_plan(expected, uids, known)
        assert preview_plan(web, CONFIG, workspace, before) == plan
        assert plan_shards(web, CONFIG, workspace, before) == plan
        written = [pq.read_table(path).to_pylist() for path in workspace.plans.glob("*.parquet")]
        assert sorted(written, key=lambda cut: cut[0]["uid"]) == cuts
    assert small_runs.exists()


def put_shard(workspace: Workspace, name: str, rows: list[Row], settings: str, key: str) -> dict[str, str]:
    """Writes a shard; returns its name by the key of each row."""
    workspace.shards.mkdir(exist_ok=True)
    values = [{key: row[key] for key in ("uid", "url", "caption")} | {"status": "ok"} for row in rows]
    write_shard(workspace.shard(name), [pa.Table.from_pylist(values, SHARD_SCHEMA)], settings, len(rows))
    return {row[key].strip(): name for row in rows}


def test_files_of_several_formats_give_the_rows_of_one(tmp_path: Path) -> None:
    rows = [{**row, "url": row["url"] or "http://web.test"} for row in rows_of(3, 90)]
    for start, name in enumerate(("a.csv", "b.jsonl", "c.parquet")):
        write(tmp_path / name, rows[start * 30 : start * 30 + 30])
    names = ["b.jsonl", "c.parquet", "a.csv", "a.csv"]
    found = read_web_table(WebTable(tuple(str(tmp_path / name) for name in names)))
    assert found.to_pylist() == obvious_rows(rows)


def test_a_folder_has_its_tables_and_those_below_and_nothing_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "urls"
    for name in ("b.jsonl", "deep/a.jsonl", ".c.jsonl", "_temporary/d.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [{"url": f"http://{name}", "caption": "c"}])
    (folder / "_SUCCESS").touch()
    (folder / "README.md").write_text("no table")
    found = read_web_table(WebTable(str(folder)))
    assert sorted(found["url"].to_pylist()) == ["http://b.jsonl", "http://deep/a.jsonl"]
    write(folder / "e.csv", [{"url": "u", "caption": "c"}])
    with pytest.raises(InputError, match=r"several formats \(csv, jsonl\); name those that are meant by a glob"):
        read_web_table(WebTable(str(folder)))


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    write(tmp_path / "urls[1].jsonl", [{"url": "u", "caption": "c"}])
    assert read_web_table(WebTable(str(tmp_path / "urls[1].jsonl"))).num_rows == 1


@pytest.mark.parametrize(("name", "message"), [("*.csv", "matches no file"), ("none", "is a folder without files")])
def test_a_glob_or_folder_of_nothing_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=message):
        read_web_table(WebTable(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"url": ["v"], "text": ["c"]}, r"b\.parquet: its columns are url, text and no uid, and those of .*a\.parquet"),
        ({"url": ["v"], "caption": ["c"], "uid": ["1"]}, r"b\.parquet: its columns are url, caption and uid"),
        ({"url": ["v"]}, r"b\.parquet: has no column of web texts"),
    ],
)
def test_files_of_other_columns_than_the_first_are_named(tmp_path: Path, second: Row, message: str) -> None:
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table(second), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=message):
        read_web_table(WebTable(str(tmp_path / "*.parquet")))


def test_a_uid_in_two_files_is_named_before_anything_is_planned(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(
            pa.table({"url": [name] * 2, "caption": ["c"] * 2, "uid": ["x", name]}), tmp_path / f"{name}.parquet"
        )
    table, workspace = WebTable(str(tmp_path / "*.parquet")), Workspace.open(tmp_path / "work")
    with pytest.raises(InputError, match=r"'uid' has 'x' more than once.* with web\.uid null"):
        plan_shards(table, CONFIG, workspace)
    assert not workspace.plans.exists()
    assert plan_shards(replace(table, uid=None), CONFIG, workspace).rows == 4


TABLE = """
import re, sys
from pathlib import Path
from blip_core.data.download import DownloadConfig, plan_shards
from blip_core.data.tables import WebTable
from blip_core.workspace import Workspace
plan = plan_shards(WebTable(sys.argv[1]), DownloadConfig(rows_per_shard=100_000), Workspace.open(sys.argv[2]))
print(plan.rows, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.fixture
def planned(tmp_path: Path) -> Callable[[int], int]:
    """The most memory, in bytes, of a process that plans a table of so many tens of thousands of rows."""
    rows = 10_000
    texts = ["text of a picture " * 8 + str(row) for row in range(rows)]

    def peak(parts: int) -> int:
        folder = tmp_path / f"urls-{parts}"
        folder.mkdir()
        for part in range(parts):
            urls = [f"http://web.test/{part}/{row}.jpg" for row in range(rows)]
            pq.write_table(pa.table({"url": urls, "caption": texts}), folder / f"{part:03}.parquet")
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", TABLE, str(folder), str(tmp_path / f"work-{parts}")]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        counted, most = map(int, run.stdout.split())
        assert counted == parts * rows
        return most

    return peak


def test_a_million_rows_more_take_hardly_more_memory(planned: Callable[[int], int]) -> None:
    few, many = planned(40), planned(120)
    # 200 bytes a row: 160 MB more come in.
    assert many - few < 60 * MEGABYTE, f"400,000 rows {few / MEGABYTE:.0f} MB, 1,200,000 rows {many / MEGABYTE:.0f} MB"
