"""A corpus on its way out: a round's rows in a format that other programs read, in files of a size (docs/export.md).

The files follow from the corpus and the options alone. Each gets its name when it is whole, so that an export that was
killed goes on behind the last one, and ends with the bytes that an unbroken one has.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from blip_core import stores
from blip_core.corpus.export_coco import FRAME_BYTES, encode_coco, write_coco
from blip_core.corpus.export_format import Format, Pair, pairs_of
from blip_core.corpus.export_lists import LIST_BYTES, csv_header_bytes, encode_blip, encode_csv, write_csv, write_list
from blip_core.corpus.export_parquet import encode_row, write_parquet
from blip_core.corpus.export_pictures import human_pictures, web_pictures
from blip_core.corpus.export_rows import HUMAN, Selection, select_rows
from blip_core.corpus.export_target import Written, claim, finish, write_file
from blip_core.corpus.export_uids import NAME as UIDS_NAME
from blip_core.corpus.export_uids import NO_UID, write_uids
from blip_core.corpus.export_webdataset import END_BYTES, encode_members, write_tar
from blip_core.corpus.rounds import promoted_round
from blip_core.corpus.schemas import CORPUS_VERSION, FINGERPRINT_KEY
from blip_core.data.shards import check_part
from blip_core.data.tables import PairTable
from blip_core.errors import ConfigError, WorkspaceError
from blip_core.files import fingerprint
from blip_core.workspace import Workspace

EXPORT_VERSION = "export/1"
SHARD_SIZE = 500_000_000
UIDS = "uids"

FORMATS: Mapping[str, Format] = {
    "parquet": Format("train-{:05d}.parquet", encode_row, write_parquet, shard_images=True, human_images=True),
    "webdataset": Format(
        "{:08d}.tar", encode_members, write_tar, END_BYTES, shard_images=True, human_images=True, index="sizes.json"
    ),
    "blip": Format("pairs-{:05d}.json", encode_blip, write_list, LIST_BYTES, left_out={"no_url": "url IS NULL"}),
    "coco": Format("captions-{:05d}.json", encode_coco, write_coco, FRAME_BYTES, human_images=True),
    "csv": Format("corpus-{:05d}.csv", encode_csv, write_csv, csv_header_bytes()),
}

# Called with the pairs that are done, and how many there are.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportSummary:
    """What an export holds.

    Attributes:
        pairs: an image with one text each; of the format `uids`, uids.
        files: those that hold pairs, and how many of them this run has written.
        bytes: of all of them.
        left_out: rows of the corpus that the format cannot hold, by the reason, one of LEFT_OUT in export_format.py.
    """

    folder: str
    format: str
    round: int
    pairs: int
    files: int
    written: int
    bytes: int
    left_out: dict[str, int]


def export_corpus(
    workspace: Workspace,
    folder: Path,
    format: str,
    *,
    round: int | None = None,
    where: str | None = None,
    shard_size: int = SHARD_SIZE,
    human: PairTable | None = None,
    progress: Progress = lambda done, total: None,
) -> ExportSummary:
    """Writes the corpus of a round into a folder that is new, empty, or of the same export, which then goes on.

    Args:
        format: one of FORMATS, or UIDS.
        round: None: the promoted one.
        where: SQL over the columns of the corpus; None: all rows.
        shard_size: the most bytes of a file that has more than one pair; `uids` is one file.
        human: the table that the human pairs are from; without it, formats that need their images leave them out.

    Raises:
        ConfigError: the predicate is none, or no row is left.
        WorkspaceError: there is no such corpus, or the folder holds something else.
        ShardError, InputError: an image that the corpus has is not in its shard or in the table.
    """
    number, corpus = _corpus_of(workspace, round)
    left_out = {"no_datacomp_uid": NO_UID} if format == UIDS else _left_out(FORMATS[format], human)
    table = human if format != UIDS and FORMATS[format].human_images else None
    about = {"version": EXPORT_VERSION, "format": format, "round": number, "where": where, "shard_size": shard_size}
    about["fingerprint"] = fingerprint(about, _identity(corpus), None if table is None else asdict(table))
    with select_rows(corpus, where, left_out) as selection:
        if not selection.web + selection.human:
            raise ConfigError(
                f"export: no row of round {number} is left; where: {where}; left out: {selection.left_out}"
            )
        about |= {"left_out": selection.left_out}
        standing = claim(folder, about)
        if format == UIDS:
            files = [standing.get(UIDS_NAME) or _write_uids(folder, selection)]
        else:
            shards = workspace.shards if FORMATS[format].shard_images else None
            pictures = Pictures(selection, shards, table)
            files = list(_write_files(folder, FORMATS[format], pictures, shard_size, standing, progress))
    pairs = sum(file.pairs for file in files)
    about |= {"pairs": pairs}
    finish(folder, about, files, None if format == UIDS else FORMATS[format].index)
    new = sum(file.name not in standing for file in files)
    size = sum(file.bytes for file in files)
    return ExportSummary(str(folder), format, number, pairs, len(files), new, size, selection.left_out)


@dataclass(frozen=True)
class Pictures:
    """Where the pairs of an export come from."""

    selection: Selection
    shards: Path | None
    human: PairTable | None

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return self.selection.web + self.selection.human

    def pairs(self, begin: int) -> Iterator[Pair]:
        """The pairs from a place on: those of the shards, then the human ones."""
        if begin >= self.count:
            return
        pictures = chain(web_pictures(self.selection, self.shards, begin), human_pictures(self.selection, self.human))
        for picture in pictures:
            yield from (pair for pair in pairs_of(picture) if pair.place >= begin)


def _write_files(
    folder: Path, format: Format, pictures: Pictures, size: int, standing: Mapping[str, Written], progress: Progress
) -> Iterator[Written]:
    """The files in their order: those that stand, and then the others, which are written."""
    begin, first = 0, 0
    while format.name.format(first) in standing:
        written = standing[format.name.format(first)]
        yield written
        begin, first = begin + written.pairs, first + 1
    for number, group in groupby(_numbered(pictures.pairs(begin), format, size, first), itemgetter(0)):
        name = format.name.format(number)
        entries = _Counted((value for _, value in group), begin, pictures.count, progress)
        if name in standing:  # one before it was taken away
            deque(entries, maxlen=0)
            written = standing[name]
        else:
            written = write_file(folder, name, partial(_write, format, entries))
        begin += written.pairs
        yield written


def _write(format: Format, entries: "_Counted", path: Path) -> int:
    format.write(path, iter(entries))
    return entries.count


def _numbered(pairs: Iterator[Pair], format: Format, size: int, number: int) -> Iterator[tuple[int, Any]]:
    """The number of the file that each entry belongs to, from `number` on, and the entry."""
    held = 0
    for pair in pairs:
        entry = format.encode(pair)
        if held and held + entry.size > size:
            number, held = number + 1, 0
        held += entry.size + (0 if held else format.overhead)
        yield number, entry.value


class _Counted:
    """Entries of one file, which are counted while they are written."""

    def __init__(self, entries: Iterator[Any], begin: int, total: int, progress: Progress) -> None:
        self.count = 0
        self._entries, self._begin, self._total, self._progress = entries, begin, total, progress

    def __iter__(self) -> Iterator[Any]:
        for entry in self._entries:
            self.count += 1
            yield entry
            self._progress(self._begin + self.count, self._total)


def _write_uids(folder: Path, selection: Selection) -> Written:
    def write(path: Path) -> int:
        count, uids = selection.uids()
        write_uids(path, count, uids)
        return count

    return write_file(folder, UIDS_NAME, write)


def _corpus_of(workspace: Workspace, round: int | None) -> tuple[int, Path]:
    number = promoted_round(workspace) if round is None else round
    if number is None:
        raise WorkspaceError(f"{workspace.root}: no round has a corpus that is shown; publish one, or name a round")
    corpus = workspace.round(number).corpus
    if next(corpus.glob("*.parquet"), None) is None:
        raise WorkspaceError(f"{corpus}: round {number} has no corpus; publish it first")
    return number, corpus


def _left_out(format: Format, human: PairTable | None) -> Mapping[str, str]:
    without = {"no_human_table": HUMAN} if format.human_images and human is None else {}
    return {**format.left_out, **without}


def _identity(corpus: Path) -> list[tuple[str, str, int]]:
    """What tells a corpus from another one: of each part its name, what it was made from, and its bytes."""

    def identity(part: Path) -> tuple[str, str, int]:
        return part.name, check_part(part, CORPUS_VERSION)[FINGERPRINT_KEY], part.stat().st_size

    return list(stores.each(sorted(corpus.glob("*.parquet")), identity))
