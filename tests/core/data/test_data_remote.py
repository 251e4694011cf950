"""Pairs and shards in an object store: the same rows, also from worker processes, and no more fetched than is asked."""

import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core import stores
from blip_core.data.pairs import PairSource, human_sources, pairs_digest
from blip_core.data.shards import SHARD_SCHEMA, check_part, iterate_shard, read_shard, write_shard
from blip_core.data.stream import PairStream
from blip_core.data.tables import PairTable
from blip_core.data.transforms import train_transform
from blip_core.errors import ShardError

AUGMENTED = train_transform(8, 0.3, flip=True, augment=True)
ROWS, IMAGE_BYTES = 1500, 20_000


def put(path: Path, bucket: str) -> Path:
    fsspec.filesystem("s3").put_file(str(path), f"{bucket}/{path.name}")
    return stores.located(f"{bucket}/{path.name}")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of 30 MB in two row groups, whose images are noise."""
    noise = np.random.default_rng(0)
    rows = [
        {"uid": f"{row:08d}", "url": f"http://web.test/{row}", "caption": f"text {row}", "status": "ok"}
        | {"sha256": f"{row:064x}", "image": noise.bytes(IMAGE_BYTES)}
        for row in range(ROWS)
    ]
    path = tmp_path_factory.mktemp("shard") / "shard.parquet"
    groups = [pa.Table.from_pylist(rows[start : start + 1000], SHARD_SCHEMA) for start in (0, 1000)]
    write_shard(path, groups, "settings", ROWS)
    return path


# A process of its own, for the server that workers are forked from keeps the environment that it was started in.
STREAM = """
import itertools, pickle, sys
from blip_core.data.stream import PairStream

if __name__ == "__main__":
    sources, settings, workers = pickle.load(sys.stdin.buffer)
    batches = itertools.islice(PairStream(sources, 8, settings, 3, workers=workers).batches(), 12)
    sys.stdout.buffer.write(pickle.dumps([(batch.images.numpy(), batch.texts) for batch in batches]))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_of_a_stream_are_those_of_local_files(
    write_pairs: Callable[..., PairSource], bucket: str, workers: int, tmp_path: Path
) -> None:
    local = [write_pairs("a", range(30), 4, broken=[5, 17]), write_pairs("b", range(30, 50), 3)]
    remote = [replace(source, path=put(source.path, bucket)) for source in local]
    assert pairs_digest(remote) == pairs_digest(local)
    script = tmp_path / "stream.py"
    script.write_text(STREAM)
    given = pickle.dumps((remote, AUGMENTED, workers))
    found = pickle.loads(subprocess.run([sys.executable, script], input=given, capture_output=True, check=True).stdout)  # noqa: S301
    expected = list(itertools.islice(PairStream(local, 8, AUGMENTED, 3).batches(), 12))
    for one, (images, texts) in zip(expected, found, strict=True):
        assert np.array_equal(one.images.numpy(), images)
        assert one.texts == texts


def test_human_pairs_are_trained_on_where_they_lie(write_pairs: Callable[..., PairSource], bucket: str) -> None:
    local = write_pairs("human", range(20))
    there = put(local.path, bucket)
    assert pairs_digest(human_sources(PairTable(str(there)))) == pairs_digest([local])


def test_a_shard_is_read_as_a_local_one(shard: Path, bucket: str) -> None:
    there = put(shard, bucket)
    assert check_part(there, "shard/1") == check_part(shard, "shard/1")
    assert read_shard(there, ["uid", "sha256"]).equals(read_shard(shard, ["uid", "sha256"]))
    columns = ["uid", "status", "image"]
    for one, other in zip(iterate_shard(shard, columns), iterate_shard(there, columns), strict=True):
        assert one.equals(other)


def test_of_columns_without_images_a_small_part_of_the_file_is_fetched(shard: Path, bucket: str) -> None:
    file = stores.readable(put(shard, bucket))
    assert pq.ParquetFile(file).read(["uid", "sha256"]).num_rows == ROWS
    assert file.cache.total_requested_bytes < shard.stat().st_size / 10


def test_a_shard_that_is_missing_or_torn_in_the_store_is_named_by_its_url(shard: Path, bucket: str) -> None:
    for name, data, said in (("torn", shard.read_bytes()[:-1000], "is torn"), ("missing", None, "not found")):
        path = stores.located(f"{bucket}/{name}.parquet")
        if data is not None:
            stores.put_bytes(data, path)
        for read in (lambda path: read_shard(path), lambda path: [*iterate_shard(path, ["uid"])]):
            with pytest.raises(ShardError, match=f"{path}: {said}"):
                read(path)
