"""The tables that the user names: URLs with web texts (read by web_rows.py), and images with human captions.

A table is opened through fsspec, so a path may be a local file or a URL of any file system that fsspec
knows. Whatever is wrong with a table is an InputError that names the table and what would be right.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from blip_core.data.table_columns import AUTO, CAPTION_NAMES, URL_NAMES, require_columns
from blip_core.data.table_files import find_files, opened
from blip_core.errors import InputError
from blip_core.settings import Settings, required, setting

PAIRS = "a table of human pairs"
PAIRS_PER_READ = 64
# A row group's compressed images come through a buffer of so many bytes; else all that were read would be held.
PAIRS_BUFFER_BYTES = 2**20
PAIRS_AHEAD = 2**23


@dataclass(frozen=True)
class WebTable(Settings):
    """A table of web pairs: one URL and one web text a row, in one file or many."""

    path: str | tuple[str, ...] = required(
        "the table of URLs: Parquet, CSV, TSV or JSON (lines, or one list); a file, a folder, a glob, or a list of "
        "them, each also as an fsspec URL"
    )
    url: str = setting(AUTO, f"its column of image URLs; auto: {', '.join(URL_NAMES)}", min_length=1)
    caption: str = setting(AUTO, f"its column of web texts; auto: {', '.join(CAPTION_NAMES)}", min_length=1)
    uid: str | None = setting(
        AUTO,
        "its column of unique identifiers; auto: uid, where there is one; null, or without one: a hash of URL and text "
        "is the uid",
    )
    columns: tuple[str, ...] | None = setting(
        None, "names of all columns of CSV or TSV without a line of names, in their order; null: the first line is it"
    )
    limit: int | None = setting(
        None, "for a trial: the first so many rows in the order of uid, and no others; null: all", ge=1
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, folders and globs."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


@dataclass(frozen=True)
class PairTable(Settings):
    """A table of human pairs: one image with one caption or several a row."""

    path: str = required("the table of human pairs: Parquet; a file, a folder or a glob, also as an fsspec URL")
    image: str = setting(
        "image", "its column of encoded images: binary, or a struct with a field 'bytes'", min_length=1
    )
    caption: str = setting("caption", "its column of captions: string, or list of strings", min_length=1)
    uid: str | None = setting(None, "its column of identifiers; without one, the sha256 of the image is the uid")

    def files(self) -> list[str]:
        """Its files, in the order of their names. Raises InputError where there are none."""
        return find_files([self.path], PAIRS)


class Pair(NamedTuple):
    """One image (encoded bytes) with its captions, at least one."""

    uid: str
    image: bytes
    captions: list[str]


def check_pair_table(table: PairTable) -> int:
    """The number of rows. Raises InputError where a file is missing, unreadable, empty, or lacks a column."""
    return sum(map(_rows_of, _by_file(table)))


def iterate_pairs(table: PairTable) -> Iterator[Pair]:
    """Human pairs in the order of the files and of their rows, read a few rows at a time.

    Raises:
        InputError: as check_pair_table, and where a row has no image bytes or no caption.
    """
    for file in _by_file(table):
        yield from _pairs_of(file)


def _by_file(table: PairTable) -> list[PairTable]:
    return [replace(table, path=path) for path in table.files()]


def _rows_of(table: PairTable) -> int:
    with opened(table.path, PAIRS, PAIRS_AHEAD) as file:
        return _pair_file(file, table).metadata.num_rows


def _pairs_of(table: PairTable) -> Iterator[Pair]:
    columns = [table.image, table.caption] + ([table.uid] if table.uid else [])
    with opened(table.path, PAIRS, PAIRS_AHEAD) as file:
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
    require_columns(schema.names, [table.image, table.caption] + ([table.uid] if table.uid else []), table.path)
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
