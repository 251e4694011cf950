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
    """The web pairs of shards, as found."""
    return [PairSource(shard) for shard in shards]


def corpus_sources(corpus: Path, shards: Path) -> list[PairSource]:
    """The web and synthetic pairs of a corpus folder, joined to the images in the folder of shards."""
    sources = []
    for part in sorted(corpus.glob("*.parquet")):
        rows = pq.read_table(part, columns=["uid", "shard", "text", "source"])
        rows = rows.filter(pc.not_equal(rows["source"], "human"))
        texts: dict[str, list[str]] = {}
        for uid, text in zip(rows["uid"].to_pylist(), rows["text"].to_pylist(), strict=True):
            texts.setdefault(uid, []).append(text)
        if texts:
            sources.append(PairSource(shards / part.name, caption=None, uid="uid", texts=texts))
    return sources


def iterate_texts(sources: Sequence[PairSource]) -> Iterator[str]:
    """Every text of the sources, in their order."""
    for source in sources:
        parquet = pq.ParquetFile(source.path)
        for group in range(parquet.num_row_groups):
            for _, texts in _group_texts(source, parquet.read_row_group(group, columns=_text_columns(source))):
                yield from texts


def pairs_digest(sources: Sequence[PairSource]) -> str:
    """Identifies what a model was trained on: every text, and the images' identity, in order."""
    digest = hashlib.sha256()
    for source in sources:
        parquet = pq.ParquetFile(source.path)
        names = parquet.schema_arrow.names
        identity = "sha256" if "sha256" in names else source.image
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=[*{*_text_columns(source), identity}])
            for row, texts in _group_texts(source, rows):
                image = rows[identity][row].as_py()
                image = image["bytes"] if isinstance(image, dict) else image
                digest.update(image if isinstance(image, bytes) else str(image).encode())
                digest.update("\0".join(texts).encode() + b"\n")
    return digest.hexdigest()[:16]


def _text_columns(source: PairSource) -> list[str]:
    names = pq.read_schema(source.path).names
    wanted = [source.caption, source.uid, "status" if "status" in names else None]
    return [name for name in wanted if name is not None]


def _group_texts(source: PairSource, rows: pa.Table) -> Iterator[tuple[int, list[str]]]:
    """(row, its texts) for the rows that have an image and a text."""
    status = rows["status"].to_pylist() if "status" in rows.column_names else ["ok"] * len(rows)
    captions = rows[source.caption].to_pylist() if source.caption else None
    uids = rows[source.uid].to_pylist() if source.uid else None
    for row, state in enumerate(status):
        if state != "ok":
            continue
        found = captions[row] if captions is not None else source.texts.get(uids[row], ())
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
            for group in range(pq.ParquetFile(source.path).num_row_groups)
        ]

    def batches(self, first: int = 0) -> Iterator[PairBatch]:
        """Batches from number `first` on; those before are passed over without decoding a picture."""
        skipped = first * self.batch_size * self.world
        batch: list[tuple[Tensor, str, int]] = []
        for number, sample in self._samples():
            if number < skipped or number % self.world != self.rank:
                continue
            torch.manual_seed(_mix(self.seed, number))
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
            window = [self._read(*self.groups[place]) for place in order[start : start + WINDOW]]
            places = [(rows, row, text) for rows, members in window for row, texts in members for text in texts]
            for place in generator.permutation(len(places)):
                rows, row, text = places[place]
                image = rows[row].as_py()
                image = image["bytes"] if isinstance(image, dict) else image
                yield PairSample(image, text, _image_id(image))

    def _read(self, index: int, group: int) -> tuple[pa.ChunkedArray, list[tuple[int, list[str]]]]:
        source = self.sources[index]
        try:
            rows = pq.ParquetFile(source.path).read_row_group(group, [*_text_columns(source), source.image])
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{source.path}: row group {group} cannot be read ({error})") from error
        return rows[source.image], list(_group_texts(source, rows))


def _image_id(image: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big") >> 1


def _mix(seed: int, number: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) & (2**63 - 1)
