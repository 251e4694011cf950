"""Tables in an object store: the rows of local files, of folders and globs too, and no more fetched than is asked."""

import gzip
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.data.download import DownloadConfig, plan_shards
from blip_core.data.tables import PairTable, WebTable, check_pair_table
from blip_core.data.web_rows import read_web_table
from blip_core.errors import InputError
from blip_core.workspace import Workspace

LINES = "url,caption\nhttp://web.test/a.jpg,one\nhttp://web.test/b.jpg,two\n"
NAMES = ["urls/1.csv", "urls/2.csv.gz", "urls/deep/3.csv"]


@pytest.fixture
def folders(tmp_path: Path, bucket: str) -> tuple[Path, str]:
    """The same tables in a local folder and in the store."""
    for number, name in enumerate(NAMES):
        data = LINES.replace("jpg", f"{number}.jpg").encode()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        fsspec.filesystem("s3").put_file(str(tmp_path / name), f"{bucket}/{name}")
    fsspec.filesystem("s3").pipe_file(f"{bucket}/urls/_SUCCESS", b"")
    return tmp_path, bucket


@pytest.mark.parametrize(
    ("where", "rows"), [("urls", 6), ("urls/*", 4), ("urls/*/*.csv", 2), ("urls/1.csv", 2), ("urls/2.csv.gz", 2)]
)
def test_tables_of_a_store_have_the_rows_of_local_ones(folders: tuple[Path, str], where: str, rows: int) -> None:
    here, there = (read_web_table(WebTable(f"{root}/{where}")) for root in folders)
    assert here.num_rows == rows
    assert there.equals(here)


def test_tables_here_and_there_are_one_table_and_one_plan(folders: tuple[Path, str], tmp_path: Path) -> None:
    here, there = folders
    mixed = WebTable((f"{there}/urls/deep", f"{here}/urls/1.csv", f"{there}/urls/2.csv.gz"))
    config = DownloadConfig(rows_per_shard=2)
    plans = [
        plan_shards(table, config, Workspace.open(tmp_path / name))
        for name, table in (("a", mixed), ("b", WebTable(f"{here}/urls")))
    ]
    assert plans[0] == plans[1]
    assert plans[0].rows == 6


def test_a_table_that_is_added_to_a_folder_is_seen(folders: tuple[Path, str]) -> None:
    _, there = folders
    assert read_web_table(WebTable(f"{there}/urls")).num_rows == 6
    fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True).pipe_file(
        f"{there}/urls/4.csv", LINES.replace("jpg", "new").encode()
    )
    assert read_web_table(WebTable(f"{there}/urls")).num_rows == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.csv", r"gone\.csv: not found"), ("*.tsv", "matches no file"), ("no-such-bucket", "not found")],
)
def test_what_is_not_in_the_store_is_named_by_its_url(folders: tuple[Path, str], name: str, message: str) -> None:
    root = "s3:/" if name == "no-such-bucket" else folders[1]
    with pytest.raises(InputError, match=message):
        read_web_table(WebTable(f"{root}/{name}" + ("/t.csv" if name == "no-such-bucket" else "")))


def test_of_a_wide_parquet_table_little_more_than_its_columns_is_fetched(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0)
    columns = {"URL": [f"http://web.test/{row}" for row in range(200)], "embedding": [noise.bytes(200_000)] * 200}
    table = pa.table({**columns, "TEXT": ["text"] * 200})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False, compression="none", row_group_size=50)
    fs = fsspec.filesystem("s3")
    fs.put_file(str(tmp_path / "t.parquet"), f"{bucket}/t.parquet")
    fetched: list[int] = []
    original = type(fs)._call_s3

    async def counted(self: object, method: str, *args: object, **kwargs: object) -> object:
        found = await original(self, method, *args, **kwargs)
        if method == "get_object":
            fetched.append(found["ContentLength"])
        return found

    monkeypatch.setattr(type(fs), "_call_s3", counted)
    assert read_web_table(WebTable(f"{bucket}/t.parquet")).num_rows == 200
    assert 0 < sum(fetched) < (tmp_path / "t.parquet").stat().st_size / 5


def test_human_pairs_in_a_store_may_be_many_files(bucket: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"i"], "caption": ["c"]}), tmp_path / "t.parquet")
    for name in ("a", "b"):
        fsspec.filesystem("s3").put_file(str(tmp_path / "t.parquet"), f"{bucket}/human/{name}.parquet")
    assert check_pair_table(PairTable(f"{bucket}/human/*.parquet")) == 2
    assert check_pair_table(PairTable(f"{bucket}/human")) == 2
