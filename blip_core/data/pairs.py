"""Where image-text pairs come from: human tables, shards of web pairs, and a corpus joined to its images.

A row group of a source is read at a time, and of its images no more than are asked for, so that memory grows
neither with the data nor with the number of files.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.data.shards import IMAGES_AHEAD
from blip_core.data.tables import PairTable
from blip_core.errors import InputError, ShardError
from blip_core.texts import MAX_CHARACTERS

# Images are decoded from Parquet so many rows at a time, their compressed bytes read through a buffer of so many.
ROWS_AT_ONCE = 64
BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class PairSource:
    """One Parquet file of images, and where their texts are.

    Attributes:
        path: the file.
        image: its image column: binary, or a struct with a field `bytes`.
        caption: its column of texts (string or list of strings); None where `texts` has them.
        uid: its column of identifiers, needed by `texts`.
        texts: the corpus part that has the texts by uid; images without an entry are left out.
        human: whether it is a table of human pairs.
    """

    path: Path
    image: str = "image"
    caption: str | None = "caption"
    uid: str | None = None
    texts: Path | None = None
    human: bool = False


class ImageText(NamedTuple):
    """One image, still encoded, with one of its texts; the image is None where the row has no bytes."""

    image: bytes | None
    text: str


def human_sources(table: PairTable) -> list[PairSource]:
    """The human pairs of a table, a source for each of its files. Raises InputError where it has none."""
    return [PairSource(stores.located(path), table.image, table.caption, human=True) for path in table.files()]


def web_sources(shards: Sequence[Path]) -> list[PairSource]:
    """The web pairs of shards, as found, in the order of their first uid.

    A shard's name follows from its URLs, and must not decide a training: one web may be served at two addresses.
    """
    return [PairSource(shard) for shard in sorted(shards, key=_first_uid)]


def corpus_sources(corpus: Path, shards: Path) -> list[PairSource]:
    """The web and synthetic pairs of a corpus folder, joined to the images in the folder of shards.

    In the order of `web_sources`, for the same reason.
    """
    sources = [
        PairSource(shards / part.name, caption=None, uid="uid", texts=part)
        for part in sorted(corpus.glob("*.parquet"))
        if pc.any(pc.not_equal(_read(part, None, ["source"])["source"], "human")).as_py()
    ]
    return sorted(sources, key=lambda source: _first_uid(source.path))


def iterate_texts(sources: Sequence[PairSource]) -> Iterator[str]:
    """Every text of the sources, in their order."""
    for source in sources:
        for group in range(len(row_groups(source))):
            for _, texts in _group_texts(source, _read_group(source, group)):
                yield from texts


def pairs_digest(sources: Sequence[PairSource]) -> str:
    """Identifies what a model was trained on: every text, and the images' identity, in order."""
    digest = hashlib.sha256()
    for source in sources:
        for identity in pair_identities(source):
            digest.update(identity)
    return digest.hexdigest()[:16]


def pair_identities(source: PairSource) -> Iterator[bytes]:
    """For each image that has a text: its sha256 where the source has it, or else its bytes, and all its texts."""
    with _open(source.path) as parquet:
        identity = "sha256" if "sha256" in parquet.schema_arrow.names else source.image
        for group in range(parquet.num_row_groups):
            rows = _read_from(parquet, source.path, [group], _text_columns(source, identity))
            images = _values(rows[identity])
            for row, texts in _group_texts(source, rows):
                image = images[row].as_py()
                shown = image if isinstance(image, bytes) else str(image).encode()
                yield shown + "\0".join(texts).encode() + b"\n"


def row_groups(source: PairSource) -> list[int]:
    """How many rows each row group of a source has.

    Raises ShardError where the file cannot be read, InputError where it lacks a column of the source.
    """
    with _open(source.path) as parquet:
        names, metadata = parquet.schema_arrow.names, parquet.metadata
    for wanted in (source.image, source.caption, source.uid):
        if wanted is not None and wanted not in names:
            raise InputError(f"{source.path}: has no column '{wanted}'; its columns are {', '.join(names) or 'none'}")
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def count_pairs(source: PairSource, group: int, parts: int = 1) -> list[int]:
    """How many pairs each share of a row group has, share r being the rows r, r + parts ...; reads no image."""
    counts = [0] * parts
    for row, texts in _group_texts(source, _read_group(source, group)):
        counts[row % parts] += len(texts)
    return counts


def read_pairs(source: PairSource, group: int, shares: Collection[int] = (0,), parts: int = 1) -> list[ImageText]:
    """The pairs of some shares of a row group, as count_pairs tells them, in the order of the rows."""
    told = [(row, texts) for row, texts in _group_texts(source, _read_group(source, group)) if row % parts in shares]
    images = _read_images(source, group, [row for row, _ in told])
    return [ImageText(image, text) for image, (_, texts) in zip(images, told, strict=True) for text in texts]


def _first_uid(shard: Path) -> str:
    """The lowest uid of a shard, whose rows are sorted by it."""
    with _open(shard) as parquet:
        first = _read_from(parquet, shard, range(min(1, parquet.num_row_groups)), ["uid"])
    return min(first["uid"].to_pylist(), default="")


def _open(path: Path, read_ahead: int = stores.READ_AHEAD) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stores.readable(path, read_ahead), buffer_size=BUFFER_BYTES, pre_buffer=False)
    except stores.errors(pa.ArrowException) as error:
        raise ShardError(f"{path}: cannot be read as Parquet ({error})") from error


def _read(path: Path, group: int | None, columns: list[str]) -> pa.Table:
    """Columns of one row group, or of all."""
    with _open(path) as parquet:
        return _read_from(parquet, path, range(parquet.num_row_groups) if group is None else [group], columns)


def _read_from(parquet: pq.ParquetFile, path: Path, groups: Sequence[int], columns: list[str]) -> pa.Table:
    """Columns of some row groups of an open file; one that is not there is passed over."""
    try:
        return parquet.read_row_groups(list(groups), columns=columns, use_threads=False)
    except stores.errors(pa.ArrowException) as error:
        raise ShardError(f"{path}: row group {next(iter(groups), 0)} cannot be read ({error})") from error


def _text_columns(source: PairSource, *more: str) -> list[str]:
    """The columns of the texts, and `more`."""
    return sorted({name for name in (source.caption, source.uid, "status", *more) if name is not None})


def _read_group(source: PairSource, group: int) -> pa.Table:
    """One row group: the columns of the texts."""
    return _read(source.path, group, _text_columns(source))


def _read_images(source: PairSource, group: int, rows: list[int]) -> list[bytes | None]:
    """The images of some rows, ascending, of a row group. Others are passed over, and never held together."""
    images: list[bytes | None] = []
    start = 0
    with _open(source.path, IMAGES_AHEAD) as parquet:
        try:
            batches = parquet.iter_batches(ROWS_AT_ONCE, [group], [source.image], use_threads=False)
            for batch in batches if rows else ():
                column = _values(batch.column(0))
                wanted = rows[len(images) : bisect_left(rows, start + len(column))]
                images += [column[row - start].as_py() for row in wanted]
                start += len(column)
        except stores.errors(pa.ArrowException) as error:
            raise ShardError(f"{source.path}: row group {group} cannot be read ({error})") from error
    return images


def _values(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The column itself, or the field `bytes` where it is of structs."""
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _group_texts(source: PairSource, rows: pa.Table) -> Iterator[tuple[int, list[str]]]:
    """(row, its texts) for the rows that have an image and a text."""
    status = rows["status"].to_pylist() if "status" in rows.column_names else ["ok"] * len(rows)
    captions = _captions(source, rows)
    for row, state in enumerate(status):
        if state != "ok":
            continue
        found = captions[row]
        texts = [found] if isinstance(found, str) else list(found or ())
        texts = [text for text in texts if text and text.strip()]
        if texts:
            yield row, texts


def _captions(source: PairSource, rows: pa.Table) -> list[str | list[str] | None]:
    """What is written of each row's image: in the row itself, or in the corpus part."""
    if source.texts is None:
        return _bounded(rows[source.caption]).to_pylist()
    kept = _read(source.texts, None, ["uid", "text", "source"])
    kept = kept.filter(pc.not_equal(kept["source"], "human"))
    texts: dict[str, list[str]] = {}
    for uid, text in zip(kept["uid"].to_pylist(), kept["text"].to_pylist(), strict=True):
        texts.setdefault(uid, []).append(text)
    return [texts.get(uid) for uid in rows[source.uid].to_pylist()]


def _bounded(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings without what stands behind the most that is read of one; lists of them as they are."""
    return pc.utf8_slice_codeunits(captions, 0, MAX_CHARACTERS) if pa.types.is_string(captions.type) else captions
