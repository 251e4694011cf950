"""Reading and writing shards: the schema is checked, and rows are counted before a shard gets its name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.data.shards import SHARD_SCHEMA, read_shard, write_shard
from blip_core.errors import ShardError


def _group(uids: list[str]) -> pa.Table:
    return pa.Table.from_pylist([{"uid": uid, "status": "failed", "reason": "dns"} for uid in uids], SHARD_SCHEMA)


def test_a_shard_is_read_back_whole_or_by_columns(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "s.parquet"
    write_shard(path, iter([_group(["a", "b"]), _group(["c"])]), "settings", 3)
    assert read_shard(path).equals(_group(["a", "b", "c"]))
    assert read_shard(path, ["reason", "uid"]).column_names == ["reason", "uid"]
    assert pq.ParquetFile(path).num_row_groups == 2


def test_a_shard_that_would_lose_a_row_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="3 rows came in and 2 would go out"):
        write_shard(tmp_path / "s.parquet", iter([_group(["a", "b"])]), "settings", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_schema_is_no_shard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": ["a"]}), tmp_path / "plain.parquet")
    with pytest.raises(ShardError, match=r"plain\.parquet: is of schema no schema name at all; it should be shard/1"):
        read_shard(tmp_path / "plain.parquet")
    named = pa.table({"uid": ["a"]}).replace_schema_metadata({"capfilt.schema": "shard/1"})
    pq.write_table(named, tmp_path / "named.parquet")
    with pytest.raises(ShardError, match=r"named\.parquet: has the columns uid string; a shard has uid string, url"):
        read_shard(tmp_path / "named.parquet")
    with pytest.raises(ShardError, match=r"gone\.parquet: not found"):
        read_shard(tmp_path / "gone.parquet")
