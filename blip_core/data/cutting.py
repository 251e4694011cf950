"""Cuts a table of web pairs into the shards that are still to be fetched, as its rows stream past.

What the workspace denies is veiled before anything else looks at it; which rows a shard has follows from their places
before. A shard is named by the hash of its rows and of the settings that its bytes depend on. What is held is one
shard's rows, and 20 bytes for each row of the shards that stand.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from blip_core import stores
from blip_core.data.denied import read_denied, veil_rows
from blip_core.data.known import KnownTexts, known_urls, trimmed
from blip_core.data.shards import read_shard, settings_of
from blip_core.data.tables import WebTable
from blip_core.data.web_rows import open_web_table
from blip_core.files import fingerprint
from blip_core.workspace import Workspace


@dataclass(frozen=True)
class DownloadPlan:
    """What a table's download consists of."""

    names: list[str]  # shards that are still to be fetched, in name order
    done: list[str]  # shards that hold rows of this table already, those of retries too, in name order
    rows: int  # rows of the table
    missing: int  # those of them that are still to be fetched
    known_url: int = 0  # those of them that are left out, for a shard of an earlier round has their URL


def cut_table(
    web: WebTable,
    rows_per_shard: int,
    settings: str,
    workspace: Workspace,
    before: Sequence[str],
    put: Callable[[str, pa.Table], None],
) -> DownloadPlan:
    """Hands the rows of every missing shard, in the order of uid, to `put` with the shard's name.

    Args:
        settings: the hash of the settings that the stored bytes depend on; only shards of these count as standing.
        before: the shards whose URLs are left out.

    Raises InputError where the table cannot be used, before anything is put; ShardError where a shard is torn.
    """
    missing = _Missing(_standing(workspace, settings), known_urls(workspace, before))
    denied = read_denied(workspace)
    names: list[str] = []
    with open_web_table(web) as table:
        for rows in _cuts((missing.of(veil_rows(rows, denied)) for rows in table.batches()), rows_per_shard):
            names.append(_shard_name(rows, settings))
            put(names[-1], rows)
        return DownloadPlan(sorted(names), sorted(missing.done), table.rows, missing.rows, missing.known_url)


def cut_rows(rows: pa.Table, rows_per_shard: int, settings: str, prefix: str) -> dict[str, pa.Table]:
    """Rows in the order of uid, cut into shards by name: the hash of rows and settings behind the prefix."""
    return {f"{prefix}{_shard_name(cut, settings)}": cut for cut in _cuts([rows], rows_per_shard)}


class _Missing:
    """Leaves out the rows that stand, and counts."""

    def __init__(self, uids: KnownTexts, urls: KnownTexts) -> None:
        self._uids, self._urls = uids, urls
        self.done: set[str] = set()
        self.rows = 0
        self.known_url = 0

    def of(self, table: pa.Table) -> pa.Table:
        """The rows whose uid and URL stand nowhere."""
        stands, owners = self._uids.find(table["uid"])
        rows = table.filter(pc.invert(stands))
        seen, others = self._urls.find(trimmed(rows["url"]))
        self.done |= owners | others
        self.known_url += pc.sum(seen).as_py() or 0
        rows = rows.filter(pc.invert(seen))
        self.rows += rows.num_rows
        return rows


def _cuts(tables: Iterable[pa.Table], rows_per_shard: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many; fewer in the last one."""
    held = None
    for table in tables:
        held = table if held is None else pa.concat_tables([held, table], promote_options="default")
        start = 0
        while held.num_rows - start >= rows_per_shard:
            yield _in_order(held.slice(start, rows_per_shard))
            start += rows_per_shard
        held = held.slice(start)
    if held is not None and held.num_rows:
        yield _in_order(held)


def _in_order(rows: pa.Table) -> pa.Table:
    """One shard's rows in the order of uid, which veiled ones have left."""
    return (rows.sort_by("uid") if "denied" in rows.column_names else rows).combine_chunks()


def _standing(workspace: Workspace, settings: str) -> KnownTexts:
    """The uids in shards of these settings."""
    paths = workspace.shard_paths()
    return KnownTexts([path.stem for path in paths], stores.each(paths, lambda path: _uids(path, settings)))


def _uids(path: Path, settings: str) -> pa.ChunkedArray:
    table = read_shard(path, ["uid"])
    return table["uid"] if settings_of(table) == settings else table["uid"].slice(0, 0)


def _shard_name(rows: pa.Table, settings: str) -> str:
    return fingerprint(settings, *(rows[column].to_pylist() for column in ("uid", "url", "caption")))
