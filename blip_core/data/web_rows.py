"""The rows of a table of web pairs, of all its files, in the order of uid: any number of them in bounded memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip_core.data.sorting import Sorter, merge_sorted
from blip_core.data.table_columns import Columns, choose_columns
from blip_core.data.table_files import find_files
from blip_core.data.table_formats import WHAT, Choose, read_file
from blip_core.data.tables import WebTable
from blip_core.errors import InputError

UID_DIGITS = 20
SCHEMA = pa.schema({"uid": pa.string(), "url": pa.string(), "caption": pa.string()})


class WebRows(NamedTuple):
    """The rows of a table of web pairs in the order of uid: uid, url, caption (strings) and duplicate (bool).

    A missing caption is the empty text. Where the table has no uid column, the uid is the first 20 hexadecimal digits
    of sha256(url NUL caption NUL occurrence), and the second and later occurrences of a pair are duplicates.
    """

    rows: int
    all_rows: int  # without the table's limit
    batches: Callable[[], Iterator[pa.Table]]


@contextmanager
def open_web_table(table: WebTable) -> Iterator[WebRows]:
    """Streams the files of a table of web pairs, and sorts them on this machine's disk; bounded memory is held.

    Raises:
        InputError: a file is missing, unreadable or broken, lacks a column or has others than the first, the table is
            empty, or a uid is null or not unique.
        WorkspaceError: this machine's cache folder cannot hold the sorted table.
    """
    with Sorter("uid") as sorter, Sorter("uid") as repeats:
        choose = _Chooser(table)
        for rows in _web_rows(table, choose):
            sorter.add(rows)
        if not sorter.rows:
            raise InputError(f"{', '.join(table.paths)}: has no rows; a table of URLs has at least one")
        for rows, occurrence in _counted(sorter.sorted()):
            again = rows.filter(pa.array(occurrence > 0))
            if again.num_rows and choose.columns and choose.columns.uid:
                raise _not_unique(table, choose.columns.uid, again["uid"][0].as_py())
            if again.num_rows:
                repeats.add(_repeated(again, occurrence[occurrence > 0]))
        every = sorter.rows
        taken = every if table.limit is None else min(every, table.limit)
        yield WebRows(taken, every, lambda: _first_rows(_merged(sorter, repeats), taken))


def check_web_table(table: WebTable) -> int:
    """The number of rows. Raises as open_web_table does."""
    with open_web_table(table) as rows:
        return rows.rows


def read_web_table(table: WebTable) -> pa.Table:
    """All of a table of web pairs at once, as WebRows has them. Raises as open_web_table does."""
    with open_web_table(table) as rows:
        return pa.concat_tables(rows.batches()).combine_chunks()


class _Chooser:
    """Chooses the columns of every file, which must be those of the first."""

    def __init__(self, table: WebTable) -> None:
        self._wanted = Columns(table.url, table.caption, table.uid)
        self._first = ""
        self.columns: Columns | None = None

    def __call__(self, present: Sequence[str], path: str) -> Columns:
        columns = choose_columns(self._wanted, present, path)
        if self.columns is None:
            self._first, self.columns = path, columns
        if columns != self.columns:
            raise InputError(
                f"{path}: its columns are {columns.listed()}, and those of {self._first} are {self.columns.listed()}; "
                "all files of a table have the same"
            )
        return columns


def _web_rows(table: WebTable, choose: Choose) -> Iterator[pa.Table]:
    """The rows of all files, with uids as if every one were its pair's first."""
    for path in find_files(table.paths, WHAT):
        for rows in read_file(path, choose, table.columns):
            uid = rows["uid"] if "uid" in rows.column_names else _first_uids(rows)
            yield pa.table({"uid": uid, "url": rows["url"], "caption": rows["caption"]}, schema=SCHEMA)


def _first_uids(rows: pa.Table) -> pa.Array:
    pairs = zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True)
    return pa.array([_uid(url, caption, 0) for url, caption in pairs], pa.string())


def _uid(url: str | None, caption: str, occurrence: int) -> str:
    return hashlib.sha256(f"{url or ''}\0{caption}\0{occurrence}".encode()).hexdigest()[:UID_DIGITS]


def _counted(tables: Iterable[pa.Table]) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Sorted rows, and of each (rows,) how many of the same uid come before it."""
    last, before = None, 0
    for table in tables:
        uids = table["uid"].combine_chunks()
        place = np.arange(len(uids))
        same = np.concatenate(([uids[0].as_py() == last], pc.equal(uids[1:], uids[:-1]).to_numpy(zero_copy_only=False)))
        # -1: the group began in an earlier table
        start = np.maximum.accumulate(np.where(same, -1, place))
        occurrence = place - start + np.where(start < 0, before, 0)
        last, before = uids[-1].as_py(), int(occurrence[-1])
        yield table, occurrence


def _repeated(rows: pa.Table, occurrence: np.ndarray) -> pa.Table:
    """The later occurrences of pairs, with uids of their own."""
    pairs = zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), occurrence.tolist(), strict=True)
    return rows.set_column(0, "uid", pa.array([_uid(*pair) for pair in pairs], pa.string()))


def _not_unique(table: WebTable, column: str, uid: str) -> InputError:
    remedy = "" if table.uid == column else "; with web.uid null, a hash of URL and text is the uid"
    return InputError(
        f"{', '.join(table.paths)}: column '{column}' has '{uid}' more than once; a uid must be unique{remedy}"
    )


def _merged(sorter: Sorter, repeats: Sorter) -> Iterator[pa.Table]:
    firsts = (_marked(rows.filter(pa.array(count == 0)), False) for rows, count in _counted(sorter.sorted()))
    return merge_sorted([firsts, (_marked(rows, True) for rows in repeats.sorted())], "uid")


def _marked(rows: pa.Table, duplicate: bool) -> pa.Table:
    return rows.append_column("duplicate", pa.repeat(pa.scalar(duplicate), rows.num_rows))


def _first_rows(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    for table in tables:
        yield table.slice(0, rows)
        rows -= table.num_rows
        if rows <= 0:
            return
