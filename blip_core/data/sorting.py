"""Sorts more rows than memory holds: sorted runs on this machine's disk, merged block by block.

What is held is one run while rows come in, and one block of every run while they go out. A table of one run never
touches the disk.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from blip_core import stores
from blip_core.data.fetch import temporary_folder
from blip_core.errors import WorkspaceError

# Sorting a run takes as much memory again.
RUN_BYTES = 2**26
BLOCK_BYTES = 2**20


class Sorter:
    """Takes tables of one schema in, and gives their rows back in the order of a column of strings; equal ones in the
    order in which they came.

    A context manager: what it wrote to the cache folder is gone when the block ends.
    """

    def __init__(self, column: str) -> None:
        self.rows = 0
        self._column = column
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._runs: list[Path] = []
        self._folder: Path | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Sorter":
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stack.close()

    def add(self, rows: pa.Table) -> None:
        """Takes rows in. Raises WorkspaceError where the cache folder cannot be written, or is full."""
        self.rows += rows.num_rows
        self._held.append(rows)
        self._held_bytes += rows.nbytes
        if self._held_bytes >= RUN_BYTES:
            self._spill()

    def sorted(self) -> Iterator[pa.Table]:
        """All rows in order, some at a time; may be asked for more than once, when all are in."""
        if not self._runs:
            self._held = [self._sorted_run()] if self._held else []
            yield from self._held
            return
        if self._held:
            self._spill()
        yield from merge_sorted([_read_run(run) for run in self._runs], self._column)

    def _sorted_run(self) -> pa.Table:
        return pa.concat_tables(self._held).combine_chunks().sort_by(self._column).combine_chunks()

    def _spill(self) -> None:
        run = self._sorted_run()
        rows = max(1, run.num_rows * BLOCK_BYTES // max(1, run.nbytes))
        folder = self._opened_folder()
        path = folder / f"{len(self._runs):06}.arrow"
        try:
            with pa.ipc.new_file(str(path), run.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
                writer.write_table(run, max_chunksize=rows)
        except OSError as error:
            raise WorkspaceError(
                f"{folder}: cannot hold the sorted table ({stores.reason(error)}); XDG_CACHE_HOME names another place"
            ) from error
        self._runs.append(path)
        self._held, self._held_bytes = [], 0

    def _opened_folder(self) -> Path:
        if self._folder is None:
            self._folder = self._stack.enter_context(temporary_folder(stores.cache_folder() / "sorting", "table"))
        return self._folder


def merge_sorted(streams: Iterable[Iterator[pa.Table]], column: str) -> Iterator[pa.Table]:
    """Merges streams of tables of one schema, each of them sorted by a column of strings; equal rows stand in the
    order of the streams. Holds a table of each."""
    heads = [head for stream in streams if (head := _next_head(stream)) is not None]
    while heads:
        if len(heads) == 1:
            yield heads[0][0]
            yield from heads[0][1]
            return
        ends = [table[column][-1].as_py() for table, _ in heads]
        bound = min(ends)
        first = ends.index(bound)
        taken, left = [], []
        for place, (table, stream) in enumerate(heads):
            # Of later streams, rows that equal the bound wait for those that the first one may still have.
            cut = _rows_until(table[column], bound, with_equal=place <= first)
            taken.append(table.slice(0, cut))
            head = (table.slice(cut), stream) if cut < table.num_rows else _next_head(stream)
            left += [head] if head is not None else []
        heads = left
        yield pa.concat_tables(taken).combine_chunks().sort_by(column)


def _next_head(stream: Iterator[pa.Table]) -> tuple[pa.Table, Iterator[pa.Table]] | None:
    """The next table that has rows."""
    table = next((table for table in stream if table.num_rows), None)
    return None if table is None else (table, stream)


def _rows_until(column: Sequence[Any], bound: str, with_equal: bool) -> int:
    """How many values of a sorted column come before the bound. Its order is that of code points, as Python's."""
    bisect = bisect_right if with_equal else bisect_left
    return bisect(range(len(column)), bound, key=lambda row: column[row].as_py())


def _read_run(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        for batch in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(batch)])
