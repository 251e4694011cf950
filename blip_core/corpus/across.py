"""Rules that compare the images of a round with each other: same bytes, the same to look at, too many of a domain.

The images come in an order of preference, the one whose best remaining text has the highest itm_score first, of equal
ones the smallest uid, then shard. So who stays follows from the images alone, in whatever order they were read. They
are held in a DuckDB database in a folder of its own, which spills, and the embeddings in a file beside it.
"""

# ruff: noqa: S608  (every name that is put into a statement is one of ours)

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from publicsuffixlist import PublicSuffixList

from blip_core import stores
from blip_core.corpus.near_duplicates import Places, Vectors, leaders
from blip_core.corpus.rules import DOMAIN_FULL, NEAR_DUPLICATE, SAME_IMAGE, ImageRules
from blip_core.corpus.schemas import EMBEDDING_VERSION
from blip_core.corpus.sql import HOST
from blip_core.corpus.verdicts import LEFT_OUT_SCHEMA
from blip_core.data.shards import check_part
from blip_core.errors import ShardError

MEMORY, THREADS = "1GiB", 4
ROWS_AT_ONCE = 100_000

# An image for which a text of it is still left: one row each.
IMAGE_SCHEMA = pa.schema(
    {
        "shard": pa.string(),
        "uid": pa.string(),
        "sha256": pa.string(),
        "url": pa.string(),
        "score": pa.float32(),  # the highest itm_score of those texts
    }
)


class Images:
    """The images of a round while they are compared."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
        self._connection = connection
        self._sql = connection.sql
        self._folder = folder

    def compare(self, images: Iterable[pa.Table], rules: ImageRules, embeddings: Path) -> None:
        """Takes in the images (IMAGE_SCHEMA, a table a shard) and asks the rules, each of what those before it left.

        `embeddings` is the folder of their parts, which near_duplicates alone reads. Raises ShardError where a part is
        missing or torn, or lacks an image.
        """
        run = self._connection.execute
        run("CREATE TABLE seen (shard VARCHAR, uid VARCHAR, sha256 VARCHAR, url VARCHAR, score FLOAT)")
        for table in images:
            self._connection.register("more", table)
            run("INSERT INTO seen SELECT shard, uid, sha256, url, score FROM more")
            self._connection.unregister("more")
        order = "score DESC NULLS LAST, uid, shard"
        run(f"CREATE TABLE image AS SELECT row_number() OVER (ORDER BY {order}) - 1 AS place, * FROM seen")
        run("DROP TABLE seen")
        run("CREATE TABLE lost (place BIGINT, reason VARCHAR, leader BIGINT)")
        if rules.unique:
            first = "min(place) OVER (PARTITION BY sha256)"
            run(
                f"INSERT INTO lost SELECT place, '{SAME_IMAGE}', first FROM (SELECT place, {first} AS first FROM image "
                "WHERE sha256 IS NOT NULL) WHERE place > first"
            )
        if rules.near_duplicates is not None:
            self._leave_out_likenesses(rules.near_duplicates, embeddings)
        if rules.per_domain is not None:
            self._fill_domains(rules.per_domain, rules.domain)

    def left_out(self) -> Iterator[tuple[str, pa.Table]]:
        """By shard, in the order of their names, the images that lost (LEFT_OUT_SCHEMA), sorted by uid."""
        query = (
            "SELECT image.shard, image.uid, reason, other.shard AS of_shard, other.uid AS of_uid FROM lost "
            "JOIN image USING (place) LEFT JOIN image AS other ON other.place = lost.leader ORDER BY 1, 2"
        )
        waiting: list[pa.Table] = []
        for batch in self._sql(query).to_arrow_reader(ROWS_AT_ONCE):
            for part in _by_shard(pa.Table.from_batches([batch])):
                if waiting and waiting[0]["shard"][0] != part["shard"][0]:
                    yield _whole(waiting)
                    waiting = []
                waiting.append(part)
        if waiting:
            yield _whole(waiting)

    def _leave_out_likenesses(self, threshold: float, embeddings: Path) -> None:
        run = self._connection.execute
        run("CREATE TABLE rest AS SELECT place, shard, uid FROM image ANTI JOIN lost USING (place) ORDER BY shard, uid")
        places = self._sql("SELECT place FROM rest ORDER BY place").to_arrow_table()["place"].to_numpy()
        if len(places) < 2:
            return
        found = leaders(self._vectors(places, embeddings), threshold)
        losers = np.flatnonzero(found != np.arange(len(found)))
        self._connection.register("alike", pa.table({"place": places[losers], "leader": places[found[losers]]}))
        run(f"INSERT INTO lost SELECT place, '{NEAR_DUPLICATE}', leader FROM alike")

    def _vectors(self, places: Places, embeddings: Path) -> Vectors:
        """The embeddings of the images at those places, in a file."""
        vectors: Vectors | None = None
        for (shard,) in self._sql("SELECT DISTINCT shard FROM rest ORDER BY shard").fetchall():
            query = "SELECT uid, place FROM rest WHERE shard = ? ORDER BY uid"
            asked = self._sql(query, params=[shard]).to_arrow_table()
            found = read_embeddings(embeddings / f"{shard}.parquet", asked["uid"])
            if vectors is None:
                shape = (len(places), found.shape[1])
                vectors = np.memmap(self._folder / "embeddings", np.float16, "w+", shape=shape)
            if found.shape[1] != vectors.shape[1]:
                raise ShardError(
                    f"{embeddings / shard}.parquet: embeddings of {found.shape[1]} numbers, others of "
                    f"{vectors.shape[1]}; annotate all shards with one Filter"
                )
            vectors[np.searchsorted(places, asked["place"].to_numpy())] = found
        assert vectors is not None
        return vectors

    def _fill_domains(self, most: int, kind: str) -> None:
        run = self._connection.execute
        run(f"CREATE TABLE home AS SELECT place, {HOST} AS domain FROM image ANTI JOIN lost USING (place)")
        if kind == "site":
            hosts = [host for (host,) in self._sql("SELECT DISTINCT domain FROM home").fetchall()]
            self._connection.register("site", pa.table({"domain": hosts, "site": [site_of(host) for host in hosts]}))
            run("CREATE OR REPLACE TABLE home AS SELECT place, site AS domain FROM home JOIN site USING (domain)")
        run(
            f"INSERT INTO lost SELECT place, '{DOMAIN_FULL}', NULL FROM home WHERE domain <> '' "
            f"QUALIFY row_number() OVER (PARTITION BY domain ORDER BY place) > {most}"
        )


@contextmanager
def comparing(folder: Path) -> Iterator[Images]:
    """Images to be compared, with all that they need in an empty folder of this machine."""
    settings: dict[str, str | bool | int | float | list[str]]
    settings = {"memory_limit": MEMORY, "threads": THREADS, "temp_directory": str(folder / "spill")}
    with duckdb.connect(folder / "images.duckdb", config=settings) as connection:
        yield Images(connection, folder)


def read_embeddings(part: Path, uids: pa.ChunkedArray) -> Vectors:
    """The embeddings of those images of a shard, (images, width). Raises ShardError where one is not there."""
    check_part(part, EMBEDDING_VERSION)
    try:
        table = pq.read_table(stores.readable(part), columns=["uid", "embedding"], partitioning=None)
    except stores.errors(pa.ArrowException) as error:
        raise ShardError(f"{part}: is torn or no Parquet file ({error}). Delete it and annotate again") from error
    index = pc.index_in(uids, value_set=table["uid"].combine_chunks())
    if index.null_count:
        missing = uids.filter(pc.is_null(index))[0].as_py()
        raise ShardError(f"{part}: has no embedding of the image {missing!r}; delete it and annotate again")
    column = table["embedding"].combine_chunks()
    vectors: Vectors = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    return vectors[index.to_numpy()]


def site_of(host: str) -> str:
    """The registered name that a host belongs to, as the Public Suffix List has it; of an address, the host itself."""
    name = host.rstrip(".")
    if name.startswith("[") or name.replace(".", "").isdigit():
        return name
    return _suffixes().privatesuffix(name) or name


@lru_cache(maxsize=1)
def _suffixes() -> PublicSuffixList:
    """The list of the installed package; nothing is fetched."""
    return PublicSuffixList()


def _by_shard(rows: pa.Table) -> Iterator[pa.Table]:
    """Cuts sorted rows where another shard begins."""
    names = rows["shard"].combine_chunks()
    changes = np.flatnonzero(pc.not_equal(names.slice(1), names.slice(0, len(names) - 1)).to_numpy(False)) + 1
    ends = [*changes.tolist(), rows.num_rows]
    for start, end in zip([0, *ends], ends, strict=False):
        if end > start:
            yield rows.slice(start, end - start)


def _whole(parts: list[pa.Table]) -> tuple[str, pa.Table]:
    rows = pa.concat_tables(parts)
    return rows["shard"][0].as_py(), rows.select(LEFT_OUT_SCHEMA.names).cast(LEFT_OUT_SCHEMA)
