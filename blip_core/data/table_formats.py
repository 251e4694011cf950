"""Streams the rows of one file of a table of URLs, whatever its format: a few megabytes of it are held.

Text is read by Python's own csv and json, which know the line of whatever is wrong; hashing the rows takes longer than
reading them. A byte that is no UTF-8 ends no table: U+FFFD stands for it. Comma-separated text is RFC 4180's, quotes
and line breaks within quotes included; in tab-separated text a quote is a character like any other, for a web text with
one quote must not swallow rows.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.data.table_columns import Columns
from blip_core.data.table_files import format_of, opened, opened_text
from blip_core.data.utf8 import as_texts, without_surrogates
from blip_core.errors import InputError

WHAT = "a table of URLs"
ROWS_AT_ONCE = 16_384
CHARACTERS_AT_ONCE = 2**24
# Of each column of a Parquet file, whose row groups may be larger than memory.
BUFFER_BYTES = 2**22
# The columns of JSON are those of so many rows.
ROWS_FOR_NAMES = 1000
LARGEST_FIELD = 2**24
LARGEST_OBJECT = 2**26
JSON_CHARACTERS = 2**20
BETWEEN_OBJECTS = re.compile(r"[\s,]*")
REPLACED = "\ufffd"  # what stands for bytes that are no UTF-8

Choose = Callable[[Sequence[str], str], Columns]
"""The columns of a file (the second argument), chosen from the names that it has."""


Row = tuple[str | None, ...]
"""URL, web text, and uid where there is one."""


def read_file(path: str, choose: Choose, names: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a file in order, some at a time: url, caption, and uid where there is one, all strings.

    A missing caption is the empty text; only a URL may be null.

    Args:
        choose: which of its columns are meant.
        names: those of the columns of separated text without a line of names.

    Raises InputError where the file cannot be read, a row is broken, or a column is of no type that can be used.
    """
    kind = format_of(path)
    if kind == "parquet":
        yield from _parquet(path, choose)
        return
    with opened_text(path, WHAT) as file:
        if kind in ("csv", "tsv"):
            yield from _separated(file, path, choose, names, tabs=kind == "tsv")
        else:
            yield from _json(file, path, choose, one_list=kind == "json")


def _parquet(path: str, choose: Choose) -> Iterator[pa.Table]:
    with opened(path, WHAT, block_bytes=stores.READ_AHEAD) as file:
        parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        columns = choose(parquet.schema_arrow.names, path)
        for name in (columns.url, columns.caption):
            _check_type(parquet.schema_arrow, name, path, is_text, "it must be string")
        if columns.uid:
            _check_type(parquet.schema_arrow, columns.uid, path, _is_uid, "a uid is string or integer")
        row = 0
        wanted = [name for name in columns if name is not None]
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=wanted, use_threads=False):
            yield _normal({name: batch[column] for name, column in _named(columns)}, path, row)
            row += batch.num_rows


def _normal(columns: dict[str, pa.Array], path: str, row: int) -> pa.Table:
    """Strings of one kind, whatever kind of string or integer they were."""
    strings = {name: as_texts(column) for name, column in columns.items()}
    strings["caption"] = pc.fill_null(strings["caption"], "")
    uid = strings.get("uid")
    if uid is not None and uid.null_count:
        place = row + pc.index(pc.is_null(uid), True).as_py()
        raise InputError(f"{path}: row {place} has no uid; every row needs one")
    return pa.table(strings)


def _check_type(schema: pa.Schema, name: str, path: str, usable: Callable[[pa.DataType], bool], expected: str) -> None:
    kind = schema.field(name).type
    if not usable(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise InputError(f"{path}: column '{name}' is {kind}; {expected}")


def is_text(kind: pa.DataType) -> bool:
    """Strings; bytes, which some writers give no other name; and nothing but nulls."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in (*tests, pa.types.is_binary, pa.types.is_large_binary))


def _is_uid(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_integer(kind)


def _separated(
    file: io.BufferedReader, path: str, choose: Choose, names: Sequence[str] | None, tabs: bool
) -> Iterator[pa.Table]:
    text = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
    lines = _separated_lines(text, path, tabs)
    if names is None:
        line, names = next(lines, (0, []))
        if not names:
            raise InputError(f"{path}: is empty; its first line names the columns")
        if any(REPLACED in name for name in names):
            raise InputError(f"{path}: line {line} is not UTF-8; save the table in that encoding")
    columns = choose(names, path)
    places = [names.index(column) for _, column in _named(columns)]
    yield from _tables(_separated_rows(lines, path, len(names), places), columns)


def _separated_lines(text: TextIO, path: str, tabs: bool) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row, with the line that it begins in; empty lines are none."""
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(text, "excel-tab", quoting=csv.QUOTE_NONE) if tabs else csv.reader(text, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}: line {line}: the row that begins there is broken ({error})") from error
        if fields:
            yield line, fields


def _separated_rows(
    lines: Iterator[tuple[int, list[str]]], path: str, width: int, places: Sequence[int]
) -> Iterator[Row]:
    for line, fields in lines:
        if len(fields) != width:
            raise InputError(f"{path}: line {line} has {len(fields)} fields, and the table has {width} columns")
        yield tuple(fields[place] for place in places)


def _json(file: io.BufferedReader, path: str, choose: Choose, one_list: bool) -> Iterator[pa.Table]:
    """One list of objects, as BLIP's own files are; one object of lists, as SBU's is; or an object a line."""
    if one_list and file.peek(1).lstrip().startswith(b"["):
        objects, noun = _list_items(io.TextIOWrapper(file, "utf-8", errors="replace"), path), "row"
    else:
        objects, noun = _json_lines(file, path, one_list), "line"
    head = list(islice(objects, ROWS_FOR_NAMES))
    for place, value in head:
        if not isinstance(value, dict):
            raise _no_object(path, noun, place)
    if head:
        columns = choose(list(dict.fromkeys(name for _, value in head for name in value)), path)
        yield from _tables(_json_rows(chain(head, objects), path, noun, columns), columns)


def _json_rows(objects: Iterator[tuple[int, Any]], path: str, noun: str, columns: Columns) -> Iterator[Row]:
    kinds = {"url": (str, "text"), "caption": (str, "text"), "uid": (str | int, "text or an integer")}
    wanted = [(column, *kinds[name]) for name, column in _named(columns)]
    for place, value in objects:
        if not isinstance(value, dict):
            raise _no_object(path, noun, place)
        values = [value.get(column) for column, *_ in wanted]
        for (column, kind, expected), found in zip(wanted, values, strict=True):
            if found is not None and (not isinstance(found, kind) or isinstance(found, bool)):
                raise InputError(f"{path}: {noun} {place}: '{column}' is {found!r:.60}; it must be {expected}")
        if columns.uid:
            if values[-1] is None:
                raise InputError(f"{path}: {noun} {place} has no '{columns.uid}'; every row needs a uid")
            values[-1] = str(values[-1])
        yield tuple(map(without_surrogates, values))


def _json_lines(file: io.BufferedReader, path: str, one_list: bool) -> Iterator[tuple[int, Any]]:
    for line, data in enumerate(file, start=1):
        try:
            value = json.loads(data.decode("utf-8", "replace")) if data.strip() else None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {line} is no JSON ({error})") from error
        if one_list and line == 1 and isinstance(value, dict) and value and _all_lists(value):
            yield from enumerate((dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)), 1)
        elif data.strip():
            yield line, value


def _all_lists(value: dict[str, Any]) -> bool:
    return all(isinstance(column, list) for column in value.values()) and len(set(map(len, value.values()))) == 1


def _list_items(text: TextIO, path: str) -> Iterator[tuple[int, Any]]:
    """The items of one list, of which only some are held."""
    decode = json.JSONDecoder().raw_decode
    buffer = text.read(JSON_CHARACTERS)
    place, row = buffer.index("[") + 1, 0
    while True:
        place = BETWEEN_OBJECTS.match(buffer, place).end()  # type: ignore[union-attr]
        if buffer.startswith("]", place):
            return
        try:
            value, place = decode(buffer, place)
        except (ValueError, RecursionError) as error:
            more = text.read(JSON_CHARACTERS) if len(buffer) - place < LARGEST_OBJECT else ""
            if not more:
                raise InputError(f"{path}: row {row} is no JSON ({error})") from error
            buffer, place = buffer[place:] + more, 0
        else:
            yield row, value
            row += 1


def _tables(rows: Iterator[Row], columns: Columns) -> Iterator[pa.Table]:
    held: list[Row] = []
    characters = 0
    for row in rows:
        held.append(row)
        characters += sum(len(value) for value in row if value is not None)
        if len(held) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield _table(held, columns)
            held, characters = [], 0
    if held:
        yield _table(held, columns)


def _table(rows: list[Row], columns: Columns) -> pa.Table:
    values = zip(*rows, strict=True)
    arrays = {name: pa.array(column, pa.string()) for (name, _), column in zip(_named(columns), values, strict=True)}
    arrays["caption"] = pc.fill_null(arrays["caption"], "")
    return pa.table(arrays)


def _named(columns: Columns) -> list[tuple[str, str]]:
    """Our names of the columns, and the file's."""
    return [(name, column) for name, column in columns._asdict().items() if column is not None]


def _no_object(path: str, noun: str, place: int) -> InputError:
    return InputError(f"{path}: {noun} {place} is no object; a row is an object such as {{'url': ...}}")
