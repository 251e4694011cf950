"""The images of an export with their rows: those of web pairs from the shards, those of human pairs from their table.

A shard is read some rows at a time. A table of human pairs has an order of its own: it is gone through once, and the
rows of each image are looked up in a database in a temporary folder, so that memory grows with neither.
"""

import hashlib
import io
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from blip_core.corpus.export_format import Picture
from blip_core.corpus.export_rows import Selection
from blip_core.data.shards import iterate_shard
from blip_core.data.tables import PairTable, iterate_pairs
from blip_core.errors import InputError, ShardError

EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}


def web_pictures(selection: Selection, shards: Path | None, begin: int) -> Iterator[Picture]:
    """The images of web and synthetic texts, shard by shard.

    Args:
        shards: the folder of shards; None where no image is needed.
        begin: of no use are the pairs before this place; the shards that have only such are not opened.
    """
    place = 0
    for part, numbers in selection.web_parts():
        if place + len(numbers) > begin:
            rows = selection.web_rows(part, numbers)
            shard = None if shards is None else shards / f"{part}.parquet"
            yield from _without_images(rows, place) if shard is None else _of_shard(rows, shard, place)
        place += len(numbers)


def human_pictures(selection: Selection, table: PairTable | None) -> Iterator[Picture]:
    """The images of human pairs, in the order of their table; without one, the rows alone in the order of uid.

    Raises InputError where the table is not the one that the corpus has its human pairs from.
    """
    if not selection.human:
        return
    if table is None:
        yield from _without_images(selection.human_rows(), selection.web)
        return
    with (
        tempfile.TemporaryDirectory(prefix="capfilt-export-") as folder,
        closing(sqlite3.connect(Path(folder) / "human.db", isolation_level=None)) as database,
    ):
        _store(database, selection)
        yield from _of_table(database, table, selection.web)


def _without_images(rows: Any, place: int) -> Iterator[Picture]:
    for _, group in groupby(rows, key=lambda row: (row["uid"], row["image_sha256"])):
        picture = Picture(place, list(group))
        yield picture
        place += len(picture.rows)


def _of_shard(rows: list[dict[str, Any]], shard: Path, place: int) -> Iterator[Picture]:
    """The images of one shard that have rows, in its order."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        waiting.setdefault(row["uid"], []).append(row)
    for batch in iterate_shard(shard, ["uid", "original_width", "original_height", "image"]):
        for number, uid in enumerate(batch["uid"].to_pylist()):
            if uid not in waiting:
                continue
            width, height, image = (batch[name][number].as_py() for name in batch.schema.names[1:])
            if image is None:
                raise ShardError(f"{shard}: uid {uid!r} has no image, and the corpus has; publish the round again")
            found = waiting.pop(uid)
            yield Picture(place, found, "jpg", image, width, height)
            place += len(found)
    if waiting:
        raise ShardError(f"{shard}: has no uid {next(iter(waiting))!r}, and the corpus has; publish the round again")


def _store(database: sqlite3.Connection, selection: Selection) -> None:
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("CREATE TABLE human (uid, sha256, candidate, row)")
    rows = ((row["uid"], row["image_sha256"], row["candidate"], json.dumps(row)) for row in selection.human_rows())
    database.execute("BEGIN")
    database.executemany("INSERT INTO human VALUES (?, ?, ?, ?)", rows)
    database.execute("CREATE INDEX by_image ON human (uid, sha256, candidate)")
    database.execute("COMMIT")


def _of_table(database: sqlite3.Connection, table: PairTable, place: int) -> Iterator[Picture]:
    for uid, image, _ in iterate_pairs(table):
        key = (uid, hashlib.sha256(image).hexdigest())
        found = database.execute(
            "SELECT row FROM human WHERE (uid, sha256) = (?, ?) ORDER BY candidate", key
        ).fetchall()
        if found:
            database.execute("DELETE FROM human WHERE (uid, sha256) = (?, ?)", key)
            yield Picture(place, [json.loads(row) for (row,) in found], _extension(image), image)
            place += len(found)
    left = database.execute("SELECT uid, sha256 FROM human LIMIT 1").fetchone()
    if left:
        raise InputError(
            f"{table.path}: has no human pair {left[0]} with an image of sha256 {left[1]}, and the corpus has; "
            "name the configuration that the round was published with"
        )


def _extension(image: bytes) -> str:
    """Of the image's file; publishing has opened it."""
    with Image.open(io.BytesIO(image)) as opened:
        kind = opened.format or "JPEG"
    return EXTENSIONS.get(kind, kind.lower())
