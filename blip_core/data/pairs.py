"""Training streams: image-text pairs from Parquet files, shuffled, endless, the same for the same seed.

A stream reads a window of row groups at a time and shuffles within it, so that memory does not grow with the
data. Any step's batch follows from (seed, step) alone, which is what makes training resumable.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from blip_core.data.images import decode_image
from blip_core.data.tables import PairTable
from blip_core.data.transforms import Transform
from blip_core.errors import InputError, ShardError

WINDOW = 16


@dataclass(frozen=True)
class PairSource:
    """One Parquet file of images, and where their texts are.

    Attributes:
        path: the file.
        image: its image column: binary, or a struct with a field `bytes`.
        caption: its column of texts (string or list of strings); None where `texts` has them.
        uid: its column of identifiers, needed by `texts`.
        texts: texts by uid; images without an entry are left out.
    """

    path: Path
    image: str = "image"
    caption: str | None = "caption"
    uid: str | None = None
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)


class PairSample(NamedTuple):
    """One image with one of its texts."""

    image: bytes
    text: str
    image_id: int


class PairBatch(NamedTuple):
    """B pairs: images (B, 3, S, S), their texts, and (B,) int64 that is equal where the image is."""

    images: Tensor
    texts: list[str]
    image_ids: Tensor


def human_source(table: PairTable) -> PairSource:
    """The human pairs of a table."""
    return PairSource(Path(table.path), table.image, table.caption)


def web_sources(shards: Sequence[Path]) -> list[PairSource]:
    """The web pairs of shards, as found, in the order of their first uid.

    A shard's name follows from its URLs, and must not decide a training: one web may be served at two addresses.
    """
    return [PairSource(shard) for shard in sorted(shards, key=_first_uid)]


def corpus_sources(corpus: Path, shards: Path) -> list[PairSource]:
    """The web and synthetic pairs of a corpus folder, joined to the images in the folder of shards.

    In the order of `web_sources`, for the same reason.
    """
    sources = []
    for part in sorted(corpus.glob("*.parquet")):
        rows = pq.read_table(part, columns=["uid", "shard", "text", "source"])
        rows = rows.filter(pc.not_equal(rows["source"], "human"))
        texts: dict[str, list[str]] = {}
        for uid, text in zip(rows["uid"].to_pylist(), rows["text"].to_pylist(), strict=True):
            texts.setdefault(uid, []).append(text)
        if texts:
            sources.append(PairSource(shards / part.name, caption=None, uid="uid", texts=texts))
    return sorted(sources, key=lambda source: _first_uid(source.path))


def _first_uid(shard: Path) -> str:
    """The lowest uid of a shard, whose rows are sorted by it."""
    parquet = _open(shard)
    if not parquet.num_row_groups:
        return ""
    return min(parquet.read_row_group(0, columns=["uid"])["uid"].to_pylist(), default="")


def iterate_texts(sources: Sequence[PairSource]) -> Iterator[str]:
    """Every text of the sources, in their order."""
    for source in sources:
        for group in range(_open(source.path).num_row_groups):
            for _, texts in _group_texts(source, _read_group(source, group)):
                yield from texts


def pairs_digest(sources: Sequence[PairSource]) -> str:
    """Identifies what a model was trained on: every text, and the images' identity, in order."""
    digest = hashlib.sha256()
    for source in sources:
        parquet = _open(source.path)
        identity = "sha256" if "sha256" in parquet.schema_arrow.names else source.image
        for group in range(parquet.num_row_groups):
            rows = _read_group(source, group, identity)
            images = _values(rows[identity])
            for row, texts in _group_texts(source, rows):
                image = images[row].as_py()
                digest.update(image if isinstance(image, bytes) else str(image).encode())
                digest.update("\0".join(texts).encode() + b"\n")
    return digest.hexdigest()[:16]


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path}: cannot be read as Parquet ({error})") from error


def _read_group(source: PairSource, group: int, *more: str) -> pa.Table:
    """One row group: the columns of the texts, and `more`."""
    parquet = _open(source.path)
    status = "status" if "status" in parquet.schema_arrow.names else None
    columns = {name for name in (source.caption, source.uid, status, *more) if name is not None}
    try:
        return parquet.read_row_group(group, columns=sorted(columns))
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{source.path}: row group {group} cannot be read ({error})") from error


def _values(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column itself, or the field `bytes` where it is of structs."""
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _places(source: PairSource, group: int) -> list[tuple[pa.Scalar, str]]:
    """The pairs of one row group: the image, still in Arrow's memory, and the text."""
    rows = _read_group(source, group, source.image)
    images = _values(rows[source.image])
    places = [(images[row], text) for row, texts in _group_texts(source, rows) for text in texts]
    if not all(image.is_valid for image, _ in places):
        raise InputError(f"{source.path}: a row has no bytes in column '{source.image}'; every pair needs its image")
    return places


def _group_texts(source: PairSource, rows: pa.Table) -> Iterator[tuple[int, list[str]]]:
    """(row, its texts) for the rows that have an image and a text."""
    status = rows["status"].to_pylist() if "status" in rows.column_names else ["ok"] * len(rows)
    if source.caption:
        captions = rows[source.caption].to_pylist()
    else:
        captions = [source.texts.get(uid) for uid in rows[source.uid].to_pylist()]
    for row, state in enumerate(status):
        if state != "ok":
            continue
        found = captions[row]
        texts = [found] if isinstance(found, str) else list(found or ())
        texts = [text for text in texts if text and text.strip()]
        if texts:
            yield row, texts


class PairStream:
    """An endless stream of batches.

    Args:
        sources: where the pairs are; each text of an image is a pair of its own.
        batch_size: B, of one process.
        transform: picture to tensor; may draw from torch's global generator, which is seeded for every pair.
        seed: decides order and augmentation.
        rank, world: this process gets every world-th pair.

    Raises InputError where the sources hold no pair at all.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        batch_size: int,
        transform: Transform,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sources = list(sources)
        self.batch_size = batch_size
        self.transform = transform
        self.seed = seed
        self.rank = rank
        self.world = world
        self.groups = [
            (index, group)
            for index, source in enumerate(self.sources)
            for group in range(_open(source.path).num_row_groups)
        ]

    def batches(self, first: int = 0) -> Iterator[PairBatch]:
        """Batches from number `first` on; those before are passed over without decoding a picture."""
        skipped = first * self.batch_size * self.world
        batch: list[tuple[Tensor, str, int]] = []
        for number, sample in self._samples():
            if number < skipped or number % self.world != self.rank:
                continue
            # transforms draw on the CPU alone; torch.manual_seed would walk all devices, for every picture
            torch.default_generator.manual_seed(_mix(self.seed, number))
            batch.append((self.transform(decode_image(sample.image)), sample.text, sample.image_id))
            if len(batch) == self.batch_size:
                images, texts, ids = zip(*batch, strict=True)
                yield PairBatch(torch.stack(images), list(texts), torch.tensor(ids))
                batch = []

    def _samples(self) -> Iterator[tuple[int, PairSample]]:
        number = epoch = 0
        while True:
            before = number
            for sample in self._epoch(epoch):
                yield number, sample
                number += 1
            if number == before:
                names = ", ".join(str(source.path) for source in self.sources[:3]) or "no file"
                raise InputError(f"training pairs: none found in {names}; an image with a text is needed")
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[PairSample]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.groups))
        for start in range(0, len(order), WINDOW):
            window = [self.groups[place] for place in order[start : start + WINDOW]]
            places = [place for index, group in window for place in _places(self.sources[index], group)]
            for place in generator.permutation(len(places)):
                scalar, text = places[place]
                image = scalar.as_py()
                yield PairSample(image, text, _image_id(image))


def _image_id(image: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big") >> 1


def _mix(seed: int, number: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) & (2**63 - 1)
