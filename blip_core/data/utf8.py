"""Texts of any table as valid UTF-8: a row with stray bytes in it is a row like any other, and no end of the table."""

import json
from typing import Any

import pyarrow as pa


def as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of strings or bytes as strings, with U+FFFD for what is no UTF-8; nulls stay."""
    if not pa.types.is_binary(column.type):
        column = column.cast(pa.string()).cast(pa.binary())  # a string column of a file need not be UTF-8
    return pa.chunked_array([_valid(chunk) for chunk in column.chunks], pa.string())


def _valid(chunk: pa.BinaryArray) -> pa.StringArray:
    try:
        return chunk.cast(pa.string())
    except pa.ArrowInvalid:
        values = (None if value is None else value.decode("utf-8", "replace") for value in chunk.to_pylist())
        return pa.array(values, pa.string())


def read_json_text(data: bytes) -> Any:
    """What JSON says. Bytes that are no text are U+FFFD in it; raises ValueError where it is no JSON."""
    return json.loads(data.decode(json.detect_encoding(data), "replace"))


def without_surrogates(value: Any) -> Any:
    """A string without halves of characters, which JSON's escapes can write and UTF-8 cannot; all else as it is."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
