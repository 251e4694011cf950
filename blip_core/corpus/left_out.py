"""The images that a round's corpus leaves out because of other images: `rounds/N/left_out/<shard>.parquet`.

Made before anything is published, from all shards of the round, where a rule asks for it. Each part names the
fingerprint of what was compared, so that parts of two comparisons are never mixed; a corpus part depends on the rows of
its own part alone, and is written anew when those change.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.corpus.across import IMAGE_SCHEMA, comparing
from blip_core.corpus.rules import PublishConfig
from blip_core.corpus.schemas import ANNOTATION_VERSION, FINGERPRINT_KEY, part_writer
from blip_core.corpus.selection import read_candidates
from blip_core.corpus.verdicts import LEFT_OUT_SCHEMA, judge_alone
from blip_core.data.denied import read_denied
from blip_core.data.shards import check_part
from blip_core.errors import ShardError
from blip_core.files import file_digest, fingerprint
from blip_core.workspace import Round, Workspace

LEFT_OUT_VERSION = "left_out/1"
COMPARED_KEY = "capfilt.compared"  # images of the shard that were compared

Progress = Callable[[int, int], None]  # shards read, and in all


class Compared(NamedTuple):
    """What came of comparing the images of a round."""

    images: int
    left_out: dict[str, int]  # by reason
    skipped: bool


def compare_round(
    workspace: Workspace, number: int, names: Sequence[str], config: PublishConfig, progress: Progress | None = None
) -> Compared:
    """Writes which images of those shards are left out because of others; nothing where it stands already.

    Compared are the images of which a text is left after all rules that see a candidate alone. Raises ShardError where
    an annotation part, or an embedding part that is needed, is missing or torn; then no part is changed.
    """
    made = workspace.round(number)
    mark = _mark(made, names, config)
    if all(_standing(part_of(made, name)) == mark for name in names):
        return _summary(made, names, skipped=True)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="capfilt-publish-") as folder, comparing(Path(folder)) as images:
        tables = _images_left(workspace, made, names, config, counts, progress)
        images.compare(tables, config.images, made.embeddings)
        pending = set(names)
        for name, rows in images.left_out():
            _write(part_of(made, name), rows, mark, counts[name])
            pending.discard(name)
        for name in sorted(pending):
            _write(part_of(made, name), LEFT_OUT_SCHEMA.empty_table(), mark, counts[name])
    return _summary(made, names, skipped=False)


def read_left_out(part: Path) -> pa.Table:
    """The images of a shard that were left out (LEFT_OUT_SCHEMA), sorted by uid. Raises ShardError as check_part."""
    check_part(part, LEFT_OUT_VERSION)
    try:
        return pq.read_table(stores.readable(part), schema=LEFT_OUT_SCHEMA, partitioning=None)
    except stores.errors(pa.ArrowException) as error:
        raise ShardError(f"{part}: is torn or no Parquet file ({error}). Delete it and publish again") from error


def part_of(made: Round, shard: str) -> Path:
    """Where the part of a shard stands."""
    return made.left_out / f"{shard}.parquet"


def _mark(made: Round, names: Sequence[str], config: PublishConfig) -> str:
    """The fingerprint of rules, shards and what is known of them."""
    known = [made.annotations] + ([made.embeddings] if config.images.near_duplicates is not None else [])
    parts = [folder / f"{name}.parquet" for folder in known for name in sorted(names)]
    digests = list(stores.each(parts, _digest))
    return fingerprint(LEFT_OUT_VERSION, asdict(config), sorted(names), digests)


def _digest(part: Path) -> str:
    try:
        return file_digest(part)
    except FileNotFoundError as error:
        raise ShardError(
            f"{part}: not found; publish compares the images of all shards, and needs it: capfilt annotate makes it"
        ) from error


def _standing(part: Path) -> str | None:
    try:
        return check_part(part, LEFT_OUT_VERSION)[FINGERPRINT_KEY]
    except ShardError:
        return None


def _images_left(
    workspace: Workspace,
    made: Round,
    names: Sequence[str],
    config: PublishConfig,
    counts: dict[str, int],
    progress: Progress | None,
) -> Iterator[pa.Table]:
    """The images of each shard of which a text is left (IMAGE_SCHEMA); tells `counts` how many."""
    denied = read_denied(workspace)
    for place, name in enumerate(sorted(names)):
        annotation = made.annotations / f"{name}.parquet"
        check_part(annotation, ANNOTATION_VERSION)
        candidates = read_candidates(annotation, workspace.shard(name), denied)
        passing = candidates.filter(pc.is_null(judge_alone(candidates, config, annotation)))
        best = passing.group_by("uid", use_threads=False).aggregate(
            [("image_sha256", "min"), ("url", "min"), ("itm_score", "max")]
        )
        shard = pa.array([name], pa.string()).take(pa.array([0] * best.num_rows, pa.int64()))
        columns = [shard, best["uid"], best["image_sha256_min"], best["url_min"], best["itm_score_max"]]
        counts[name] = best.num_rows
        yield pa.table(columns, schema=IMAGE_SCHEMA)
        if progress is not None:
            progress(place + 1, len(names))


def _write(part: Path, rows: pa.Table, mark: str, images: int) -> None:
    with part_writer(part, LEFT_OUT_SCHEMA, LEFT_OUT_VERSION, mark, {COMPARED_KEY: str(images)}) as writer:
        writer.write(rows)


def _summary(made: Round, names: Sequence[str], skipped: bool) -> Compared:
    images, reasons = 0, Counter[str]()
    for name in names:
        images += int(check_part(part_of(made, name), LEFT_OUT_VERSION)[COMPARED_KEY])
        reasons.update(read_left_out(part_of(made, name))["reason"].to_pylist())
    return Compared(images, dict(sorted(reasons.items())), skipped)
