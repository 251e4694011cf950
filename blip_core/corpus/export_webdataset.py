"""Pairs as WebDataset tars: key.jpg, key.txt and key.json, one after the other.

Names are those of DataComp's pools: files of eight digits, keys of a uid and a number, `uid`, `url`, `text`, `sha256`
and sizes in the JSON. Members hold no time and no owner, so that the same pairs are the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from blip_core.corpus.export_format import Entry, Pair

BLOCK = tarfile.BLOCKSIZE
# A tar ends with two empty blocks and is filled up to a record.
END_BYTES = 2 * BLOCK + tarfile.RECORDSIZE

Members = list[tuple[str, bytes]]


def encode_members(pair: Pair) -> Entry:
    """The members of a pair, by name; their size with their headers."""
    sizes = {"original_width": pair.picture.original_width, "original_height": pair.picture.original_height}
    about = {"key": pair.key, **pair.row, "sha256": pair.row["image_sha256"], **sizes}
    contents = {
        pair.picture.extension: pair.picture.image or b"",
        "txt": pair.row["text"].encode(),
        "json": json.dumps(about, ensure_ascii=False).encode(),
    }
    members = [(f"{pair.key}.{kind}", data) for kind, data in contents.items()]
    return Entry(members, sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in members))


def write_tar(path: Path, pairs: Iterator[Members]) -> None:
    """Writes the members of pairs as one tar."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for members in pairs:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            tar.members = []  # type: ignore[attr-defined]  # it would keep all that were added
