"""Texts of any table as valid UTF-8: a row with stray bytes in it is a row like any other, and no end of the table."""

import pyarrow as pa


def as_texts(column: pa.Array) -> pa.Array:
    """Strings of any kind, bytes or integers as strings, with U+FFFD for what is no UTF-8; nulls stay."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not pa.types.is_binary(column.type):
        column = column.cast(pa.string()).cast(pa.binary())  # a string column of a file need not be UTF-8
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values = (None if value is None else value.decode("utf-8", "replace") for value in column.to_pylist())
        return pa.array(values, pa.string())


def without_surrogates(text: str | None) -> str | None:
    """A text without halves of characters, which JSON's escapes can write and UTF-8 cannot: U+FFFD stands for each."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
