"""Which rows of a round's corpus an export has: all, or those for which a SQL predicate over the corpus is true.

DuckDB says which rows of which part, and sorts no more than that, on disk where it is much; what it may read is the
round's corpus. The order is that of the parts and of their rows, so that it is the same whenever it is asked for.
"""

# ruff: noqa: S608  (a view cannot take parameters; every value that is put into it is quoted, or of ours)

import glob
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.corpus.query import check_statement
from blip_core.corpus.schemas import CORPUS_SCHEMA
from blip_core.corpus.sql import confine, let_reach, one_line, quoted, unstable_functions
from blip_core.errors import ConfigError, QueryError, ShardError

ROWS_AT_ONCE = 10_000
MEMORY, THREADS = "1GiB", 4
HUMAN, NOT_HUMAN = "source = 'human'", "source <> 'human'"


class Selection:
    """The rows of a corpus that are exported, and how many are not, by the reason."""

    def __init__(self, corpus: Path, chosen: duckdb.DuckDBPyRelation, left_out: Mapping[str, str]) -> None:
        reasons = " ".join(f"WHEN {condition} THEN {quoted(reason)}" for reason, condition in left_out.items())
        reason = f"CASE {reasons} END" if reasons else "NULL::VARCHAR"
        counts = chosen.aggregate(f"{reason} AS reason, {HUMAN} AS human, count(*) AS rows").fetchall()
        self.left_out = dict.fromkeys(left_out, 0)
        for why, _, rows in counts:
            if why is not None:
                self.left_out[why] += rows
        self.web = sum(rows for why, human, rows in counts if why is None and not human)
        self.human = sum(rows for why, human, rows in counts if why is None and human)
        self._corpus = corpus
        self._chosen = chosen.filter(f"({reason}) IS NULL")

    def web_parts(self) -> Iterator[tuple[str, list[int]]]:
        """By shard, in the order of their names: the numbers of the rows of its corpus part, ascending."""
        places = self._chosen.filter(NOT_HUMAN).project(
            "parse_filename(filename, true) AS part, file_row_number AS row"
        )
        batches = places.order("part, row").to_arrow_reader(ROWS_AT_ONCE)
        rows = (row for batch in batches for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))
        for part, group in groupby(rows, itemgetter(0)):
            yield part, [number for _, number in group]

    def web_rows(self, part: str, numbers: list[int]) -> list[dict[str, Any]]:
        """Those rows of a corpus part. Raises ShardError where it cannot be read."""
        path = self._corpus / f"{part}.parquet"
        try:
            table = pq.read_table(stores.readable(path), schema=CORPUS_SCHEMA, partitioning=None)
        except stores.errors(pa.ArrowException) as error:
            raise ShardError(f"{path}: cannot be read ({error}); publish the round again") from error
        return plain_rows(table.take(numbers))

    def human_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of human pairs, sorted by uid and candidate."""
        columns = ", ".join(f'"{name}"' for name in CORPUS_SCHEMA.names)
        rows = self._chosen.filter(HUMAN).project(columns).order("uid, image_sha256, candidate")
        for batch in rows.to_arrow_reader(ROWS_AT_ONCE):
            yield from plain_rows(pa.Table.from_batches([batch]))

    def uids(self) -> tuple[int, Iterator[list[str]]]:
        """How many different uids there are; and they, some at a time, in lower case, 32 digits each, sorted."""
        uids = self._chosen.project("lpad(lower(uid), 32, '0') AS uid").distinct()
        [(count,)] = uids.aggregate("count(*)").fetchall()
        return count, (batch["uid"].to_pylist() for batch in uids.order("uid").to_arrow_reader(ROWS_AT_ONCE))


@contextmanager
def select_rows(corpus: Path, where: str | None, left_out: Mapping[str, str]) -> Iterator[Selection]:
    """Yields the rows of a corpus folder that a predicate keeps.

    Args:
        where: SQL over the columns of the corpus; None: all rows. Its subqueries may ask the view `corpus`.
        left_out: conditions by their reason; a row for which one is true is counted and left out.

    Raises ConfigError where the predicate is not one that only reads and says true or false, QueryError where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="capfilt-export-") as spill, duckdb.connect() as connection:
        try:
            let_reach(connection, corpus)
            parts = quoted(f"{glob.escape(str(corpus))}/*.parquet")
            source = f"read_parquet({parts}, filename = true, file_row_number = true)"
            connection.execute(f"CREATE VIEW corpus AS SELECT * FROM {source}")
            connection.execute("SET enable_progress_bar = false")
            connection.execute(f"SET memory_limit = '{MEMORY}'")
            connection.execute(f"SET threads = {THREADS}")
            confine(connection, corpus, spill)
            chosen = connection.table("corpus")
            yield Selection(corpus, chosen if where is None else _chosen(connection, chosen, where), left_out)
        except duckdb.Error as error:
            raise QueryError(f"export of {corpus}: {one_line(error)}") from error


def plain_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of Python values; a float32 is the shortest number that stands for it, 0.9 and not 0.8999999761581421."""
    for place, field in enumerate(table.schema):
        if pa.types.is_float32(field.type):
            shortest = table.column(place).cast(pa.string()).cast(pa.float64())
            table = table.set_column(place, field.name, shortest)
    return table.to_pylist()


def _chosen(
    connection: duckdb.DuckDBPyConnection, rows: duckdb.DuckDBPyRelation, where: str
) -> duckdb.DuckDBPyRelation:
    try:
        predicate = duckdb.SQLExpression(where)  # parses exactly one expression
        check_statement(connection, f"SELECT {where}")
        kind = str(rows.select(predicate).types[0])
        unstable = unstable_functions(connection, where)
        chosen = rows.filter(predicate)
    except (duckdb.Error, QueryError) as error:
        what = one_line(error) if isinstance(error, duckdb.Error) else str(error)
        raise ConfigError(_predicate_error(where, what)) from error
    if kind != "BOOLEAN":
        raise ConfigError(_predicate_error(where, f"the expression is {kind}, not true or false"))
    if unstable:
        what = f"{unstable[0]}() differs from run to run; to draw a sample, use hash(uid)"
        raise ConfigError(_predicate_error(where, what))
    return chosen


def _predicate_error(where: str, what: str) -> str:
    return f"where {where!r}: {what}; the columns are {', '.join(CORPUS_SCHEMA.names)}"
