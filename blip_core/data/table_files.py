"""Where tables lie: files, folders and globs, on this machine or in any store that fsspec knows.

A table may be many files. They are taken in the order of their names, each once, and what is wrong with one of them is
an InputError that names it.
"""

import csv
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs

from blip_core import stores
from blip_core.errors import InputError

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
MAGIC = "*?["
# A page of the web is one file, whatever signs its address has.
SINGLE = ("http://", "https://")
BUFFER_BYTES = 2**20


def find_files(paths: Sequence[str], what: str) -> list[str]:
    """The files of a table, each once, in the order of their names.

    Args:
        paths: files, folders and globs. Of a folder, with those in it, the files of a known format are taken, of a
            glob those that match; whose names begin with '.' or '_' are no part of a table.
        what: the table, for the errors.

    Raises InputError where a folder or a glob has no such file, or a folder has files of several formats.
    """
    found: dict[str, str] = {}
    for path in paths:
        with naming(path, what):
            found |= _files_of(path, what)
    return [found[name] for name in sorted(found)]


def format_of(path: str) -> str:
    """Of FORMATS, by the end of the name. Raises InputError for another end."""
    kind = _known_format(path)
    if kind is None:
        raise InputError(f"{path}: of no known format; a table's name ends with one of {', '.join(FORMATS)}")
    return kind


@contextmanager
def opened(path: str, what: str, block_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """The file, unpacked where it is packed; errors of opening and of reading become InputErrors.

    Args:
        block_bytes: what is fetched of a store's file beyond what is asked for; None: what suits reading all of it.
    """
    with naming(path, what):
        fs, name = _located(path)
        options: dict[str, Any] = {} if block_bytes is None else {"cache_type": "readahead", "block_size": block_bytes}
        # fsspec's own reader of .zst is another package, and ends with the first of several frames.
        zstd = _plain_name(path).endswith(".zst")
        with fs.open(name, "rb", compression=None if zstd else "infer", **options) as file:
            yield cast("IO[bytes]", pa.CompressedInputStream(file, "zstd")) if zstd else file


@contextmanager
def opened_text(path: str, what: str) -> Iterator[io.BufferedReader]:
    """The same for text, with a buffer, without the mark of byte order that some programs begin it with."""
    with opened(path, what) as file:
        buffered = io.BufferedReader(cast(Any, file), BUFFER_BYTES)
        if buffered.peek(3).startswith(b"\xef\xbb\xbf"):
            buffered.read(3)
        yield buffered


@contextmanager
def naming(path: str, what: str) -> Iterator[None]:
    """Within, whatever goes wrong with reading is an InputError that names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; name {what}") from error
    except stores.errors(
        ValueError, KeyError, EOFError, ImportError, zlib.error, lzma.LZMAError, csv.Error, pa.ArrowException
    ) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path}: cannot be read as {what} ({cause[0]})") from error


def _located(path: str) -> tuple[Any, str]:
    """The file system and its name for the path; nothing that it lists is kept, for tables grow."""
    protocol, separator, _ = path.partition(stores.SEPARATOR)
    options = stores.OPTIONS.get(protocol, {}) if separator else {}
    return cast("tuple[Any, str]", url_to_fs(path, **options, **({"use_listings_cache": False} if separator else {})))


def _files_of(path: str, what: str) -> dict[str, str]:
    """The files of one path by the names that their file system knows them under."""
    if path.startswith(SINGLE) or stores.CHAIN in path:
        return {path: path}
    fs, name = _located(path)
    if fs.isdir(name):
        return _tables(fs, name, path, f"is a folder without files that end with {', '.join(FORMATS)}; name {what}")
    if fsspec.core.has_magic(name) and not fs.exists(name):
        return _named(fs, _of_known_format(fs.glob(name)), f"{path}: matches no file of a known format; name {what}")
    return {fs.unstrip_protocol(name): path}


def _tables(fs: Any, folder: str, path: str, nothing: str) -> dict[str, str]:
    below = len(folder.rstrip("/"))
    names = [name for name in fs.find(folder) if not any(part[:1] in "._" for part in name[below + 1 :].split("/"))]
    found = _named(fs, _of_known_format(names), f"{path}: {nothing}")
    formats = sorted({format_of(name) for name in found})
    if len(formats) > 1:
        raise InputError(
            f"{path}: has tables of several formats ({', '.join(formats)}); name those that are meant by a glob, such "
            f"as {path.rstrip('/')}/*.{formats[0]}"
        )
    return found


def _of_known_format(names: Sequence[str]) -> list[str]:
    return [name for name in names if _known_format(name) and name.rpartition("/")[2][:1] not in "._"]


def _named(fs: Any, names: list[str], nothing: str) -> dict[str, str]:
    if not names:
        raise InputError(nothing)
    local = "file" in fs.protocol
    return {fs.unstrip_protocol(name): name if local else fs.unstrip_protocol(name) for name in names}


def _plain_name(path: str) -> str:
    return path.lower().split("?")[0] if path.startswith(SINGLE) else path.lower()


def _known_format(path: str) -> str | None:
    name = _plain_name(path)
    for packing in PACKINGS:
        name = name.removesuffix(packing)
    return next((kind for suffix, kind in FORMATS.items() if name.endswith(suffix)), None)
