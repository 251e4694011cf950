"""Rows taken out of parts that stand: each part is written anew under its own name, in one atomic step.

What is left of it is as it was, its fingerprint included, so that it goes on standing and nothing is made again: the
part is what the step would have written without those rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.corpus.schemas import BEFORE_KEY, IMAGES_KEY, ROWS_KEY, UNSCORED_KEY, PartWriter
from blip_core.data.denied import DENIED_REASONS, VEIL, Denied, veil, veiled_row
from blip_core.data.shards import (
    ROW_GROUP_ROWS,
    SETTINGS_KEY,
    SHARD_SCHEMA,
    SHARD_VERSION,
    check_part,
    iterate_shard,
    read_shard,
    write_shard,
)
from blip_core.errors import ShardError
from blip_core.files import atomic_file, file_digest

ARROW_KEY = b"ARROW:schema"


def denied_rows(part: Path | pa.Table, denied: Denied, veiled: Set[str] = frozenset()) -> list[bool]:
    """For each row of a part whether it is denied: by its URL, by its image, or by its uid (`veil` of it)."""
    rows = part if isinstance(part, pa.Table) else _read(part)
    urls = rows["url"].to_pylist() if "url" in rows.column_names else [None] * rows.num_rows
    images = rows["image_sha256"].to_pylist() if "image_sha256" in rows.column_names else None
    uids = rows["uid"].to_pylist() if veiled else [""] * rows.num_rows
    return [
        reason is not None or (bool(veiled) and veil(uid) in veiled)
        for reason, uid in zip(denied.reasons(urls, images), uids, strict=True)
    ]


def _read(path: Path) -> pa.Table:
    """The columns of a part by which a row may be denied."""
    with _open(path) as parquet:
        return parquet.read([name for name in ("uid", "url", "image_sha256") if name in parquet.schema_arrow.names])


def remove_rows(path: Path, gone: list[bool], counts: Mapping[str, str] | None = None) -> None:
    """Writes a part anew without the rows that are `gone`.

    Args:
        counts: key-value metadata of the part that changes with it. Where it has images, rows or unscored rows of an
            annotation or embedding part, they are counted here.
    """
    _rewrite(path, lambda rows: rows.filter(pa.array([not out for out in gone], pa.bool_())), counts)


def _rewrite(path: Path, change: Callable[[pa.Table], pa.Table], counts: Mapping[str, str] | None = None) -> None:
    """Writes a part anew with its rows changed, unless it is so already."""
    with _open(path) as parquet:
        rows, schema, metadata = parquet.read(), parquet.schema_arrow, _own_metadata(parquet)
    kept = change(rows)
    changed = _counted(rows, kept, metadata) | dict(counts or {})
    if kept.equals(rows) and all(metadata.get(key) == value for key, value in changed.items()):
        return
    inner = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    inner |= {key: value for key, value in changed.items() if key in inner}
    schema = schema.with_metadata(inner)
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as file:
        writer = PartWriter(file, schema)
        writer.write(kept)
        writer.finish()
        writer.describe({key: value for key, value in (metadata | changed).items() if key not in inner})


def remove_annotations(path: Path, gone: list[bool]) -> None:
    """The same for an annotation part, which keeps the digest that the corpus parts made from it know it by."""
    if any(gone):
        remove_rows(path, gone, {BEFORE_KEY: annotation_digest(path)})


def likenesses(part: Path, veiled: Mapping[str, Set[str]]) -> tuple[list[bool], list[bool]]:
    """For each row of a left_out part whether its image goes, and whether the one that is kept in its place does.

    Args:
        veiled: the names that denied rows have in the shards, by shard.
    """
    with _open(part) as parquet:
        rows = parquet.read(["uid", "of_shard", "of_uid"]).to_pylist()
    gone = [veil(row["uid"]) in veiled.get(part.stem, ()) for row in rows]
    return gone, [bool(row["of_uid"]) and veil(row["of_uid"]) in veiled.get(row["of_shard"], ()) for row in rows]


def remove_likenesses(path: Path, gone: list[bool], leaderless: Sequence[bool]) -> None:
    """The same for a left_out part; a row whose leader goes stays, until the images are compared again, without it."""
    rest = [None if lost else place for place, lost in enumerate(leaderless)]

    def change(rows: pa.Table) -> pa.Table:
        for name in ("of_shard", "of_uid"):
            column = rows[name].take(pa.array(rest, pa.int64()))
            rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
        return rows.filter(pa.array([not out for out in gone], pa.bool_()))

    _rewrite(path, change)


def annotation_digest(path: Path) -> str:
    """sha256 of an annotation part; of one that rows were taken out of, as it was first."""
    with _open(path) as parquet:
        before = _own_metadata(parquet).get(BEFORE_KEY)
    return file_digest(path) if before is None else before


def _counted(before: pa.Table, kept: pa.Table, metadata: Mapping[str, str]) -> dict[str, str]:
    """The counts that a part has, without what is taken out of it."""
    images, left = (len(pc.unique(rows["uid"])) for rows in (before, kept))
    lost = {IMAGES_KEY: images - left, ROWS_KEY: before.num_rows - kept.num_rows}
    if UNSCORED_KEY in metadata:
        unscored, left = (rows.num_rows - rows["reason"].null_count for rows in (before, kept))
        lost[UNSCORED_KEY] = unscored - left
    return {key: str(int(metadata[key]) - number) for key, number in lost.items() if key in metadata}


def _own_metadata(parquet: pq.ParquetFile) -> dict[str, str]:
    found = parquet.metadata.metadata or {}
    return {key.decode(): value.decode() for key, value in found.items() if key != ARROW_KEY}


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(stores.readable(path)) as parquet:
            yield parquet
    except stores.errors(pa.ArrowException) as error:
        raise ShardError(f"{path}: is torn or no Parquet file ({error}). Delete it and run the step again") from error


class ShardRows:
    """What a shard has of denied rows."""

    def __init__(self, path: Path, denied: Denied) -> None:
        rows = read_shard(path, ["uid", "url", "status", "reason", "sha256"])
        columns = {name: rows[name].to_pylist() for name in rows.column_names}
        self.path = path
        self.reasons = denied.reasons(columns["url"], columns["sha256"])
        self.uids = columns["uid"]
        found = [place for place, reason in enumerate(self.reasons) if reason is not None]
        # Whatever row of it stands veiled: other parts may still have it.
        self.veiled = {veil(self.uids[place]) for place in found} | {
            uid for uid, why in zip(self.uids, columns["reason"], strict=True) if _is_veiled(uid, why)
        }
        self.found = found
        self.images = sum(columns["status"][place] == "ok" for place in found)

    def remove(self) -> None:
        """Writes the shard anew: of each denied row there stays that it is not there, and why."""
        settings = check_part(self.path, SHARD_VERSION).get(SETTINGS_KEY, "")
        write_shard(self.path, _regrouped(self._rows()), settings, len(self.uids))

    def _rows(self) -> Iterator[pa.Table]:
        """All rows, some at a time, in the order of uid."""
        hidden = [veiled_row(self.uids[place], str(self.reasons[place])) for place in self.found]
        hidden.sort(key=lambda row: str(row["uid"]))
        start = 0
        for batch in iterate_shard(self.path, SHARD_SCHEMA.names):
            reasons = self.reasons[start : start + batch.num_rows]
            start += batch.num_rows
            kept = pa.Table.from_batches([batch]).select(SHARD_SCHEMA.names)
            kept = kept.filter(pa.array([reason is None for reason in reasons], pa.bool_()))
            last = self.uids[start - 1]
            due = [row for row in hidden if str(row["uid"]) < last]
            hidden = hidden[len(due) :]
            yield _merged(kept, due)
        yield _merged(SHARD_SCHEMA.empty_table(), hidden)


def _is_veiled(uid: str, reason: str | None) -> bool:
    return reason in DENIED_REASONS and uid.startswith(VEIL)


def _merged(kept: pa.Table, hidden: list[dict[str, Any]]) -> pa.Table:
    kept = kept.cast(SHARD_SCHEMA)
    return pa.concat_tables([kept, pa.Table.from_pylist(hidden, SHARD_SCHEMA)]).sort_by("uid") if hidden else kept


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in the row groups of a shard."""
    waiting = SHARD_SCHEMA.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while waiting.num_rows >= ROW_GROUP_ROWS:
            yield waiting.slice(0, ROW_GROUP_ROWS).combine_chunks()
            waiting = waiting.slice(ROW_GROUP_ROWS)
    if waiting.num_rows:
        yield waiting.combine_chunks()
