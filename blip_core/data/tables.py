"""The tables that the user names: URLs with web texts, and images with human captions.

A table is opened through fsspec, so a path may be a local file or a URL of any file system that fsspec
knows. Whatever is wrong with a table is an InputError that names the table and what would be right.
"""

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.data.utf8 import as_texts, read_json_text, without_surrogates
from blip_core.errors import InputError
from blip_core.settings import Settings, required, setting

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
UID_DIGITS = 20
PAIRS_PER_READ = 64
# A row group's compressed images come through a buffer of so many bytes; else all that were read would be held.
PAIRS_BUFFER_BYTES = 2**20
ROWS_PER_HASHING = 65_536
JSON_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class WebTable(Settings):
    """A table of web pairs: one URL and one web text a row."""

    path: str = required("the table of URLs: Parquet, CSV, TSV or JSON (lines, or one list); a file or an fsspec URL")
    url: str = setting("url", "its column of image URLs", min_length=1)
    caption: str = setting("caption", "its column of web texts", min_length=1)
    uid: str | None = setting(None, "its column of unique identifiers; without one, a hash of URL and text is the uid")
    limit: int | None = setting(
        None, "for a trial: the first so many rows in the order of uid, and no others; null: all", ge=1
    )


@dataclass(frozen=True)
class PairTable(Settings):
    """A table of human pairs: one image with one caption or several a row."""

    path: str = required("the table of human pairs: Parquet; a file or an fsspec URL")
    image: str = setting(
        "image", "its column of encoded images: binary, or a struct with a field 'bytes'", min_length=1
    )
    caption: str = setting("caption", "its column of captions: string, or list of strings", min_length=1)
    uid: str | None = setting(None, "its column of identifiers; without one, the sha256 of the image is the uid")


class Pair(NamedTuple):
    """One image (encoded bytes) with its captions, at least one."""

    uid: str
    image: bytes
    captions: list[str]


def read_web_table(table: WebTable) -> pa.Table:
    """Reads a table of web pairs.

    Returns:
        uid, url, caption (strings) and duplicate (bool), sorted by uid; the first `limit` of them where there is a
        limit. A missing caption is the empty text. Where the table names no uid column, the uid is the first 20
        hexadecimal digits of sha256(url NUL caption NUL occurrence), and the second and later occurrences of a pair
        are duplicates.

    Raises:
        InputError: the table is missing, unreadable or empty, lacks a column, or a uid is null or not unique.
    """
    wanted = [table.url, table.caption] + ([table.uid] if table.uid else [])
    with _opened(table.path, "a table of URLs") as file:
        rows = _READERS[_format_of(table.path)](file, table.path, wanted)
    if rows.num_rows == 0:
        raise InputError(f"{table.path}: has no rows; a table of URLs has at least one")
    url = _string_column(rows, table.url, table.path)
    caption = pc.fill_null(_string_column(rows, table.caption, table.path), "")
    if table.uid:
        uid = _user_uids(rows, table.uid, table.path)
        duplicate = pa.array(np.zeros(rows.num_rows, dtype=bool))
    else:
        uid, duplicate = _hashed_uids(url, caption)
    result = pa.table({"uid": uid, "url": url, "caption": caption, "duplicate": duplicate})
    return result.sort_by("uid").slice(0, table.limit).combine_chunks()


def check_pair_table(table: PairTable) -> int:
    """The number of rows. Raises InputError where the table is missing, unreadable, empty, or lacks a column."""
    with _opened(table.path, "a table of human pairs") as file:
        return _pair_file(file, table).metadata.num_rows


def iterate_pairs(table: PairTable) -> Iterator[Pair]:
    """Human pairs in file order, read a few rows at a time.

    Raises:
        InputError: as check_pair_table, and where a row has no image bytes or no caption.
    """
    columns = [table.image, table.caption] + ([table.uid] if table.uid else [])
    with _opened(table.path, "a table of human pairs") as file:
        row = 0
        for batch in _pair_file(file, table).iter_batches(PAIRS_PER_READ, columns=columns):
            for values in batch.to_pylist():
                yield _pair(values, table, row)
                row += 1


def _pair(values: dict, table: PairTable, row: int) -> Pair:
    image = values[table.image]
    if isinstance(image, dict):
        image = image["bytes"]
    if not image:
        raise InputError(f"{table.path}: row {row} has no bytes in column '{table.image}'; every pair needs its image")
    captions = values[table.caption]
    captions = [text for text in ([captions] if isinstance(captions, str) else captions or []) if text]
    if not captions:
        raise InputError(f"{table.path}: row {row} has no text in column '{table.caption}'; every pair needs one")
    uid = values[table.uid] if table.uid else hashlib.sha256(image).hexdigest()
    if uid is None:
        raise InputError(f"{table.path}: row {row} has no value in column '{table.uid}'; a uid may not be null")
    return Pair(str(uid), image, captions)


def _pair_file(file: IO[bytes], table: PairTable) -> pq.ParquetFile:
    parquet = pq.ParquetFile(file, buffer_size=PAIRS_BUFFER_BYTES, pre_buffer=False)
    schema = parquet.schema_arrow
    _require_columns(schema.names, [table.image, table.caption] + ([table.uid] if table.uid else []), table.path)
    image, caption = schema.field(table.image).type, schema.field(table.caption).type
    if not (_is_binary(image) or (pa.types.is_struct(image) and _is_binary(_struct_field(image, "bytes")))):
        raise InputError(
            f"{table.path}: column '{table.image}' is {image}; it must be binary, or a struct with a field 'bytes'"
        )
    if not (_is_string(caption) or (_is_list(caption) and _is_string(caption.value_type))):
        raise InputError(f"{table.path}: column '{table.caption}' is {caption}; it must be string, or list of strings")
    if parquet.metadata.num_rows == 0:
        raise InputError(f"{table.path}: has no rows; a table of human pairs has at least one")
    return parquet


def _struct_field(kind: pa.StructType, name: str) -> pa.DataType:
    index = kind.get_field_index(name)
    return kind.field(index).type if index >= 0 else pa.null()


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


@contextmanager
def _opened(path: str, what: str) -> Iterator[IO[bytes]]:
    """The file, unpacked where it is compressed; errors of opening and of reading become InputErrors."""
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            yield file
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; name {what}") from error
    except stores.errors(ValueError, KeyError, EOFError, ImportError, zlib.error, pa.ArrowException) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path}: cannot be read as {what} ({cause[0]})") from error


def _format_of(path: str) -> str:
    name = path.lower().split("?")[0]
    for packing in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(packing)
    for suffix, kind in FORMATS.items():
        if name.endswith(suffix):
            return kind
    raise InputError(f"{path}: of no known format; a table's name ends with one of {', '.join(FORMATS)}")


def _read_parquet(file: IO[bytes], path: str, wanted: list[str]) -> pa.Table:
    parquet = pq.ParquetFile(file)
    _require_columns(parquet.schema_arrow.names, wanted, path)
    return parquet.read(columns=wanted)


def _read_csv(file: IO[bytes], path: str, wanted: list[str]) -> pa.Table:
    # RFC 4180: a quoted field may hold separators and line breaks.
    return _read_separated(file, path, wanted, pa.csv.ParseOptions(newlines_in_values=True))


def _read_tsv(file: IO[bytes], path: str, wanted: list[str]) -> pa.Table:
    # In tab-separated text a quote is a character like any other: a web text with one quote must not swallow rows.
    return _read_separated(file, path, wanted, pa.csv.ParseOptions(delimiter="\t", quote_char=False))


def _read_separated(file: IO[bytes], path: str, wanted: list[str], parse: pa.csv.ParseOptions) -> pa.Table:
    if not file.read(1):
        raise InputError(f"{path}: is empty; its first line names the columns")
    file.seek(0)
    _require_columns(pa.csv.open_csv(file, parse_options=parse).schema.names, wanted, path)
    file.seek(0)
    # as bytes: one that is no UTF-8 would end the reading of all
    raw = pa.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.binary()))
    rows = pa.csv.read_csv(file, parse_options=parse, convert_options=raw)
    return pa.table({name: as_texts(rows[name]) for name in rows.column_names})


def _read_json(file: IO[bytes], path: str, wanted: list[str]) -> pa.Table:
    """One list of objects, as BLIP's own files are, or an object a line."""
    head = file.read(4096).lstrip()
    file.seek(0)
    if not head.startswith(b"["):
        return _read_json_lines(file, path, wanted)
    objects = read_json_text(file.read())
    if not all(isinstance(value, dict) for value in objects):
        raise InputError(f"{path}: is a list of other things than objects; a row is an object such as {{'url': ...}}")
    if objects:
        _require_columns(sorted(set().union(*objects)), wanted, path)
    return pa.table({name: [without_surrogates(value.get(name)) for value in objects] for name in wanted})


def _read_json_lines(file: IO[bytes], path: str, wanted: list[str]) -> pa.Table:
    if not file.read(1):
        raise InputError(f"{path}: has no rows; a table of URLs has at least one")
    file.seek(0)
    rows = pa.json.read_json(file, read_options=pa.json.ReadOptions(block_size=JSON_BLOCK_BYTES))
    _require_columns(rows.column_names, wanted, path)
    return rows.select(wanted)


_READERS = {
    "parquet": _read_parquet,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "json": _read_json,
    "jsonl": _read_json_lines,
}


def _require_columns(present: list[str], wanted: list[str], path: str) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        raise InputError(f"{path}: has no column '{missing[0]}'; its columns are {', '.join(present) or 'none'}")


def _string_column(rows: pa.Table, name: str, path: str) -> pa.ChunkedArray:
    column = rows[name]
    if not _is_string(column.type) and not pa.types.is_null(column.type):
        raise InputError(f"{path}: column '{name}' is {column.type}; it must be string")
    return as_texts(column)


def _user_uids(rows: pa.Table, name: str, path: str) -> pa.ChunkedArray:
    column = rows[name]
    if not _is_string(column.type) and not pa.types.is_integer(column.type):
        raise InputError(f"{path}: column '{name}' is {column.type}; a uid is string or integer")
    column = as_texts(column.cast(pa.string()))
    if column.null_count:
        raise InputError(f"{path}: column '{name}' has {column.null_count} nulls; every row needs a uid")
    counts = pc.value_counts(column)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        value, count = repeated[0]["values"].as_py(), repeated[0]["counts"].as_py()
        raise InputError(f"{path}: column '{name}' has '{value}' {count} times; a uid must be unique")
    return column


def _uid(url: str | None, caption: str, occurrence: int) -> str:
    return hashlib.sha256(f"{url or ''}\0{caption}\0{occurrence}".encode()).hexdigest()[:UID_DIGITS]


def _hashed_uids(url: pa.ChunkedArray, caption: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """uid and duplicate of every row. Occurrences are counted in numpy: the table may have ten million rows."""
    pairs = (
        pair
        for batch in pa.table([url, caption], ["url", "caption"]).to_batches(ROWS_PER_HASHING)
        for pair in zip(batch["url"].to_pylist(), batch["caption"].to_pylist(), strict=True)
    )
    first = np.fromiter((_uid(*pair, 0).encode() for pair in pairs), dtype=f"S{UID_DIGITS}", count=len(url))
    order = np.argsort(first, kind="stable")
    ordered = first[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    group_sizes = np.diff(np.append(starts, len(ordered)))
    occurrence = np.empty(len(first), dtype=np.int64)
    occurrence[order] = np.arange(len(first)) - np.repeat(starts, group_sizes)
    uids = [value.decode() for value in first.tolist()]
    for row in np.flatnonzero(occurrence).tolist():
        uids[row] = _uid(url[row].as_py(), caption[row].as_py(), int(occurrence[row]))
    return pa.array(uids, pa.string()), pa.array(occurrence > 0)
