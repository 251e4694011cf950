"""What a format of an export is: how a pair becomes an entry of a known size, and how entries become a file.

A format knows nothing of folders, sizes of files or of what was written before: it gets entries and a path.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from blip_core.errors import ConfigError

# A file's name in an archive, without dots: what follows the first one is the kind of the file.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
HASH_DIGITS = 32

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", re.IGNORECASE)
POWERS = ("", "k", "m", "g", "t")

# Why rows of a corpus are left out of an export.
LEFT_OUT = {
    "no_human_table": "a human pair, and no configuration names the table that has its image",
    "no_url": "the pair has no URL, as human pairs have none",
    "no_datacomp_uid": "a human pair, which is of no pool, or a uid that is no hexadecimal number of 32 digits at most",
}


class Picture(NamedTuple):
    """One image, and the rows of the corpus that tell of it.

    Attributes:
        place: of its first row in the export, from 0.
        rows: by column of the corpus.
        extension: the kind of its file, such as jpg.
        image: encoded; None where the format needs none.
        original_width: of the image as fetched, pixels; None where that is not known, as is original_height.
    """

    place: int
    rows: list[dict[str, Any]]
    extension: str = "jpg"
    image: bytes | None = None
    original_width: int | None = None
    original_height: int | None = None


class Pair(NamedTuple):
    """One text of an image: the row of the corpus, its place in the export from 0, and its key, unique there."""

    place: int
    key: str
    row: dict[str, Any]
    picture: Picture


class Entry(NamedTuple):
    """What a format makes of a pair, and how many bytes that takes in its file."""

    value: Any
    size: int


@dataclass(frozen=True)
class Format:
    """How an export is written.

    Attributes:
        name: of a file, of its number.
        encode: a pair as an entry.
        write: entries, in their order, as one file of that path.
        overhead: bytes of a file that are no entry's.
        shard_images: whether it needs the images of the shards.
        human_images: whether it needs those of the human pairs.
        left_out: the rows that it cannot hold: a SQL condition over the corpus by the reason, one of LEFT_OUT.
        index: the name of a JSON file with the number of pairs of each file; None: there is none.
    """

    name: str
    encode: Callable[[Pair], Entry]
    write: Callable[[Path, Iterator[Any]], None]
    overhead: int = 0
    shard_images: bool = False
    human_images: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)
    index: str | None = None


def pairs_of(picture: Picture) -> Iterator[Pair]:
    """The pairs of an image."""
    for offset, row in enumerate(picture.rows):
        yield Pair(picture.place + offset, pair_key(row), row, picture)


def pair_key(row: Mapping[str, Any]) -> str:
    """`<uid>-<candidate>`, or `<uid>-h<candidate>` of a human pair; a uid that cannot be a file's name is hashed."""
    uid = row["uid"]
    name = uid if PLAIN_NAME.fullmatch(uid) else hashlib.sha256(uid.encode()).hexdigest()[:HASH_DIGITS]
    return f"{name}-{'h' if row['source'] == 'human' else ''}{row['candidate']}"


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB, 1.5 GiB or 100000. Raises ConfigError where it is none."""
    found = SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"size {text!r}: must be a number of bytes with a unit, such as 500MB or 1GiB")
    number, unit, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** POWERS.index(unit.lower()))
    if size < 1:
        raise ConfigError(f"size {text!r}: must be at least one byte")
    return size
