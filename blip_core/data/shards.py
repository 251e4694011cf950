"""A shard: one Parquet file of web pairs with their images, failures included.

A shard is sorted by uid, in row groups of 1,000 rows, and holds no time of day: the same answers of the web
give the same bytes. What stands under a final name is whole, and is checked against its schema when read.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.errors import ShardError
from blip_core.files import atomic_file

SHARD_VERSION = "shard/1"
ROW_GROUP_ROWS = 1_000
# What is read at once where a shard is not read whole; its compressed bytes come through a buffer.
ROWS_AT_ONCE = 64
BUFFER_BYTES = 2**20
# What is fetched from a store at once where images are read one after the other.
IMAGES_AHEAD = 2**23

SCHEMA_KEY = "capfilt.schema"
SETTINGS_KEY = "capfilt.settings"

# Shards of rows that failed in others for a passing reason, and were settled by another try (blip_core.data.retry).
RETRY_PREFIX = "retry-"

SHARD_SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "url": pa.string(),
        "caption": pa.string(),
        "status": pa.string(),
        "reason": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "original_width": pa.int32(),
        "original_height": pa.int32(),
        "sha256": pa.string(),
        "image": pa.binary(),
    }
)

# A reader holds a dictionary and a page at least. Images do not repeat, so a dictionary of them would be as large as
# the row group; and whether a page has its megabyte is asked every so many rows.
REPETITIVE = [name for name in SHARD_SCHEMA.names if name != "image"]
ROWS_BETWEEN_PAGES = 16

REASONS = {
    "no_url": "the row has no URL",
    "scheme_refused": "the URL, or where it leads to, is of another scheme than http and https; it was not opened",
    "credentials_refused": "the URL, or where it leads to, has a user name in it; it was not opened",
    "forbidden_address": "the host, or where it leads to, has an address that is not public; it was not connected to",
    "duplicate_row": "an earlier row has the same URL and text",
    "bad_url": "the URL is malformed",
    "not_found": "the server answered 404 or 410",
    "too_many_redirects": "the server leads on more than max_redirects times, or in a circle",
    "too_many_bytes": "the answer, with all that leads to it, has more than max_bytes",
    "overloaded": "the server answered 429, 500, 502, 503 or 504",
    "http_error": "the server answered with another error",
    "refused_by_robots": "the server's X-Robots-Tag header forbids the use",
    "robots_txt": "the host's robots.txt forbids user_agent the URL; it was not asked for",
    "tls": "the server's certificate or its TLS cannot be trusted",
    "dns": "the host's name could not be resolved",
    "connection": "the host could not be reached, or it broke the connection off",
    "timeout": "the server did not answer in time",
    "interrupted": "the shard's wall-clock limit ended the fetching",
    "not_an_image": "the bytes are of no image format that is read",
    "truncated": "the image ends too early",
    "unreadable": "the image is malformed",
    "too_large": "the image has more pixels than max_pixels",
    "too_small": "a side of the image is shorter than min_side",
    "denied_url": "the URL is on the workspace's deny list; the row's URL and text are not kept",
    "denied_domain": "the URL's domain is on the deny list; the row's URL and text are not kept",
    "denied_image": "the image is on the deny list; the row's URL and text are not kept",
    "duplicate_image": "a shard that stood when the round began has the same image",
}

# Reasons that may be gone a minute later.
TRANSIENT = frozenset({"dns", "connection", "timeout", "interrupted", "overloaded"})


def settings_of(table: pa.Table) -> str:
    """The hash of the download settings that a shard, or the plan of one, was made with; empty where it names none."""
    return (table.schema.metadata or {}).get(SETTINGS_KEY.encode(), b"").decode()


def read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of a shard, or those columns of it, with its metadata. Raises ShardError as check_part does."""
    try:
        with pq.ParquetFile(stores.readable(path)) as parquet:
            _check_schema(path, parquet.metadata, SHARD_VERSION)
            table = parquet.read(columns)
            table = table if columns is None else table.select([name for name in columns if name in table.schema.names])
    except FileNotFoundError as error:
        raise _missing(path, SHARD_VERSION) from error
    except stores.errors(pa.ArrowException) as error:
        raise _torn(path, error) from error
    _check_columns(path, table.schema, columns if columns is not None else SHARD_SCHEMA.names)
    return table


def iterate_shard(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Those columns of a shard, some rows at a time; holds a small part of it. Raises ShardError as read_shard does."""
    check_part(path, SHARD_VERSION)
    try:
        file = stores.readable(path, IMAGES_AHEAD if "image" in columns else stores.READ_AHEAD)
        with pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
            schema = pa.schema([field for field in parquet.schema_arrow if field.name in columns])
            _check_columns(path, schema, columns)
            yield from parquet.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False)
    except stores.errors(pa.ArrowException) as error:
        raise _torn(path, error) from error


def check_part(path: Path, schema_name: str) -> dict[str, str]:
    """The key-value metadata of a part.

    Raises:
        ShardError: the file is missing, torn, or its `capfilt.schema` is not `schema_name`.
    """
    try:
        return _check_schema(path, pq.read_metadata(stores.readable(path)), schema_name)
    except FileNotFoundError as error:
        raise _missing(path, schema_name) from error
    except stores.errors(pa.ArrowException) as error:
        raise _torn(path, error) from error


def _check_schema(path: Path, parquet: pq.FileMetaData, schema_name: str) -> dict[str, str]:
    metadata = parquet.metadata or {}
    values = {key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"capfilt.")}
    if values.get(SCHEMA_KEY) != schema_name:
        found = values.get(SCHEMA_KEY, "no schema name at all")
        raise ShardError(f"{path}: is of schema {found}; it should be {schema_name}. Delete it and run the step again")
    return values


def write_shard(path: Path, groups: Iterable[pa.Table], settings: str, rows: int) -> None:
    """Writes the row groups of a shard and puts it into place, whole.

    Args:
        path: the shard's final name.
        groups: tables of SHARD_SCHEMA, at most ROW_GROUP_ROWS rows each, in the order of uid.
        settings: hash of the settings that the bytes depend on.
        rows: how many rows came in.

    Raises:
        ShardError: another number of rows would go out than came in.
    """
    schema = SHARD_SCHEMA.with_metadata({SCHEMA_KEY: SHARD_VERSION, SETTINGS_KEY: settings})
    with atomic_file(path) as temporary:
        written = 0
        with pq.ParquetWriter(
            temporary, schema, compression="zstd", use_dictionary=REPETITIVE, write_batch_size=ROWS_BETWEEN_PAGES
        ) as writer:
            for group in groups:
                writer.write_table(group.cast(schema), row_group_size=ROW_GROUP_ROWS)
                written += group.num_rows
        if written != rows:
            raise ShardError(f"{path}: {rows} rows came in and {written} would go out; nothing was written")


def _missing(path: Path, schema_name: str) -> ShardError:
    return ShardError(f"{path}: not found; a part of schema {schema_name} should stand there")


def _torn(path: Path, error: Exception) -> ShardError:
    return ShardError(f"{path}: is torn or no Parquet file ({error}). Delete it and run the step again")


def _check_columns(path: Path, found: pa.Schema, names: list[str]) -> None:
    expected = pa.schema([SHARD_SCHEMA.field(name) for name in names])
    if not found.equals(expected):
        raise ShardError(f"{path}: has the columns {_listed(found)}; a shard has {_listed(expected)}")


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
