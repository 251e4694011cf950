"""Pairs as lists without images: BLIP's JSON lists of URL and caption, and CSV with the columns of the corpus."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from blip_core.corpus.export_format import Entry, Pair
from blip_core.corpus.schemas import CORPUS_SCHEMA

OPENING, BETWEEN, CLOSING = b"[\n", b",\n", b"\n]\n"
LIST_BYTES = len(OPENING) + len(CLOSING)


def encode_blip(pair: Pair) -> Entry:
    """`{"url": ..., "caption": ...}`, as the lists of bootstrapped pairs of BLIP's authors have it."""
    item = json.dumps({"url": pair.row["url"], "caption": pair.row["text"]}, ensure_ascii=False).encode()
    return Entry(item, len(item) + len(BETWEEN))


def write_list(path: Path, items: Iterator[bytes]) -> None:
    """Writes items of JSON as one list."""
    with path.open("wb") as file:
        file.write(OPENING)
        for place, item in enumerate(items):
            file.write(BETWEEN + item if place else item)
        file.write(CLOSING)


def encode_csv(pair: Pair) -> Entry:
    """A line with the columns of the corpus; null is an empty cell."""
    line = _line(pair.row[name] for name in CORPUS_SCHEMA.names)
    return Entry(line, len(line))


def write_csv(path: Path, lines: Iterator[bytes]) -> None:
    """Writes lines below one of the columns' names."""
    with path.open("wb") as file:
        file.write(_line(CORPUS_SCHEMA.names))
        file.writelines(lines)


def csv_header_bytes() -> int:
    """How long the line of names is."""
    return len(_line(CORPUS_SCHEMA.names))


def _line(cells: object) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)  # type: ignore[arg-type]
    return text.getvalue().encode()
