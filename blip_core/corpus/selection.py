"""Publishing: a SQL predicate over annotations decides which candidates the corpus keeps (BLIP, section 3.3).

The default is the paper's rule, "the Filter's argmax says match". DuckDB evaluates the predicate in a
connection that can reach no file; pyarrow writes the part, so that the same inputs give the same bytes.
"""

import hashlib
import io
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from blip_core import stores
from blip_core.corpus.removal import annotation_digest, denied_rows
from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    CORPUS_SCHEMA,
    CORPUS_VERSION,
    FINGERPRINT_KEY,
    ROW_GROUP_ROWS,
    write_part,
)
from blip_core.corpus.sql import one_line, unstable_functions
from blip_core.data.denied import NOTHING, Denied
from blip_core.data.images import MALFORMED, ORIENTATION_TAG
from blip_core.data.shards import check_part, read_shard
from blip_core.data.tables import PairTable, iterate_pairs
from blip_core.errors import ConfigError, InputError, QueryError, ShardError
from blip_core.files import fingerprint
from blip_core.settings import Settings, setting
from blip_core.texts import candidate_text

WHERE_KEY = "capfilt.where"
BEST_OF_KEY = "capfilt.best_of"
KEPT_KEY = "capfilt.kept"
REJECTED_KEY = "capfilt.rejected"

MOST_CAPTIONS = 128  # of one image; `candidate` is an int8
TURNED = (5, 6, 7, 8)  # the EXIF orientations that swap width and height

# What a predicate may name: every column of an annotation, and the size of its image.
PREDICATE_SCHEMA = pa.schema([*ANNOTATION_SCHEMA, pa.field("width", pa.int32()), pa.field("height", pa.int32())])


@dataclass(frozen=True)
class PublishConfig(Settings):
    """Which candidates the corpus keeps."""

    where: str = setting(
        "itm_score > 0.5",
        "SQL predicate over the columns of annotations, width and height; what is not true is rejected",
        min_length=1,
    )
    best_of: bool = setting(
        False, "of an image's synthetic texts that pass, keeps the one with the highest itm_score alone"
    )


@dataclass(frozen=True)
class PublishSummary:
    """What publishing one part kept. `by_source` counts the kept rows."""

    shard: str
    kept: int
    rejected: int
    by_source: dict[str, int]
    skipped: bool


def check_predicate(where: str) -> None:
    """Raises ConfigError where `where` is not one true-or-false expression over the columns of a candidate."""
    with _locked_connection(PREDICATE_SCHEMA.empty_table()) as connection:
        try:
            _verdicts(connection, where)
            kind = str(connection.table("annotations").select(duckdb.SQLExpression(where)).types[0])
            unstable = unstable_functions(connection, where)
        except duckdb.Error as error:
            raise ConfigError(_predicate_error(where, one_line(error))) from error
    if kind != "BOOLEAN":
        raise ConfigError(_predicate_error(where, f"the expression is {kind}, not true or false"))
    if unstable:
        what = f"{unstable[0]}() differs from run to run; to draw a sample, use hash(uid)"
        raise ConfigError(_predicate_error(where, what))


def publish_shard(
    annotation: Path,
    shard: Path,
    target: Path,
    where: str,
    round: int,
    best_of: bool = False,
    denied: Denied = NOTHING,
) -> PublishSummary:
    """Writes the corpus part of one shard: the rows of `annotation` for which `where` is true.

    A candidate without scores never passes. With `best_of` the best synthetic text of an image alone does, by
    itm_score, of equal ones the first. What is `denied` is no candidate, and no part that has it stands. Does nothing
    where `target` stands with the same predicate, `best_of`, round and annotations. Raises ConfigError for the
    predicate, QueryError where it fails on a row, and ShardError where a part is torn or the shard lacks an annotated
    image.
    """
    check_predicate(where)
    check_part(annotation, ANNOTATION_VERSION)
    mark = fingerprint(CORPUS_VERSION, where, best_of, round, annotation_digest(annotation))
    if standing_fingerprint(target, denied) == mark:
        return read_summary(target, skipped=True)
    candidates = _candidates(annotation, shard, denied)
    keep = _keep(candidates, where, annotation)
    if best_of:
        keep = _best_synthetic(candidates, keep)
    kept, rejected = candidates.filter(keep), pc.sum(pc.invert(keep)).as_py() or 0
    if kept.num_rows + rejected != candidates.num_rows:
        raise ShardError(f"{target}: {kept.num_rows} kept, {rejected} rejected of {candidates.num_rows} candidates")
    columns = {name: kept[name] for name in CORPUS_SCHEMA.names if name != "round"}
    columns["round"] = pa.array([round] * kept.num_rows, pa.int32())
    metadata = {WHERE_KEY: where, BEST_OF_KEY: json.dumps(best_of), **_counts(kept.num_rows, rejected)}
    write_part(target, pa.table(columns, schema=CORPUS_SCHEMA), CORPUS_VERSION, mark, metadata)
    return read_summary(target, skipped=False)


def publish_human(human: PairTable, folder: Path, round: int, denied: Denied = NOTHING) -> PublishSummary:
    """Writes the human pairs as the corpus part `human-<fingerprint>.parquet`; they are not judged (BLIP, 3.3).

    Rejected is a caption without a word or too long for one, or whose image cannot be opened; a denied image is left
    out. A part of other human pairs in `folder` is removed, so that a changed table never doubles them.
    """
    rows, rejected, digest = _human_rows(human, round, denied)
    mark = fingerprint(CORPUS_VERSION, round, digest)
    target = folder / f"human-{mark}.parquet"
    skipped = standing_fingerprint(target, denied) == mark
    if not skipped:
        write_part(target, rows, CORPUS_VERSION, mark, _counts(rows.num_rows, rejected))
    for other in set(folder.glob("human-*.parquet")) - {target}:
        other.unlink()
    return read_summary(target, skipped)


def _human_rows(human: PairTable, round: int, denied: Denied) -> tuple[pa.Table, int, str]:
    """The human pairs as rows of the corpus, how many captions were rejected, and a digest of all of them."""
    batches: list[pa.Table] = []
    rows: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    digest = hashlib.sha256()
    for uid, image, captions in iterate_pairs(human):
        size = _image_size(image)
        identity = hashlib.sha256(image).hexdigest()
        for text in captions:
            digest.update(f"{uid}\0{identity}\0{text}\n".encode())
            if identity in denied.images:
                continue
            shown = candidate_text(text)
            if size is not None and shown.text.strip() and not shown.too_long:
                width, height = size
                shared = {"source": "human", "width": width, "height": height, "round": round}
                row = {"uid": uid, "image_sha256": identity, "text": shown.text, "candidate": seen[uid]}
                rows.append(row | shared)
            seen[uid] += 1
        if seen[uid] > MOST_CAPTIONS:
            raise InputError(f"{human.path}: image {uid} has more than {MOST_CAPTIONS} captions; is it a placeholder?")
        if len(rows) >= ROW_GROUP_ROWS:
            batches.append(pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA))
            rows = []
    table = pa.concat_tables([*batches, pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA)])
    return table, seen.total() - table.num_rows, digest.hexdigest()


def _counts(kept: int, rejected: int) -> dict[str, str]:
    return {KEPT_KEY: str(kept), REJECTED_KEY: str(rejected)}


def _image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as shown (after EXIF orientation), from the header alone; None where it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ORIENTATION_TAG, 1) in TURNED
            return (image.height, image.width) if turned else image.size
    except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning, *MALFORMED):
        return None


def standing_fingerprint(target: Path, denied: Denied = NOTHING) -> str | None:
    """The fingerprint of the corpus part under that name; None where there is none, it is torn or has denied rows."""
    if not target.exists():
        return None
    try:
        found = check_part(target, CORPUS_VERSION)[FINGERPRINT_KEY]
        return None if denied and any(denied_rows(target, denied)) else found
    except ShardError:
        return None  # written anew


def read_summary(target: Path, skipped: bool) -> PublishSummary:
    """The summary of a corpus part, read back from the part itself."""
    metadata = check_part(target, CORPUS_VERSION)
    counts = pq.read_table(stores.readable(target), columns=["source"])["source"].value_counts().to_pylist()
    by_source = {count["values"]: count["counts"] for count in sorted(counts, key=lambda count: count["values"])}
    rejected = int(metadata[REJECTED_KEY])
    return PublishSummary(target.stem, sum(by_source.values()), rejected, by_source, skipped)


def _candidates(annotation: Path, shard: Path, denied: Denied) -> pa.Table:
    """The annotations with width and height of their images (PREDICATE_SCHEMA), in the order of the part."""
    rows = pq.read_table(stores.readable(annotation), schema=ANNOTATION_SCHEMA)
    if denied:
        rows = rows.filter(pc.invert(pa.array(denied_rows(rows, denied), pa.bool_())))
    sizes = read_shard(shard, columns=["uid", "width", "height"])
    place = {uid: row for row, uid in enumerate(sizes["uid"].to_pylist())}
    try:
        index = pa.array([place[uid] for uid in rows["uid"].to_pylist()], pa.int64())
    except KeyError as error:
        raise ShardError(f"{annotation}: uid {error.args[0]!r} is not in {shard}; annotate the shard again") from error
    columns = [*rows.columns, sizes["width"].take(index), sizes["height"].take(index)]
    return pa.table(columns, schema=PREDICATE_SCHEMA)


def _keep(candidates: pa.Table, where: str, annotation: Path) -> pa.Array:
    with _locked_connection(candidates) as connection:
        try:
            verdicts = _verdicts(connection, where).to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(f"publish.where {where!r} fails on {annotation}: {one_line(error)}") from error
    if verdicts.num_rows != candidates.num_rows:
        raise QueryError(f"publish.where {where!r}: {verdicts.num_rows} verdicts for {candidates.num_rows} candidates")
    return verdicts.sort_by("place")["keep"].combine_chunks()


def _best_synthetic(candidates: pa.Table, keep: pa.Array) -> pa.Array:
    """`keep` without the synthetic texts of an image that another one of it beats."""
    columns = (candidates[name].to_pylist() for name in ("uid", "source", "itm_score", "candidate"))
    verdicts = keep.to_pylist()
    best: dict[str, tuple[float, int, int]] = {}
    for place, (uid, source, score, candidate) in enumerate(zip(*columns, strict=True)):
        if verdicts[place] and source == "synthetic":
            verdicts[place] = False
            best[uid] = min(best.get(uid, (math.inf, 0, 0)), (-score, candidate, place))
    for _, _, place in best.values():
        verdicts[place] = True
    return pa.array(verdicts, pa.bool_())


def _locked_connection(candidates: pa.Table) -> duckdb.DuckDBPyConnection:
    """A connection whose one table is `annotations`, with a column `place`; it can open no file."""
    connection = duckdb.connect()
    places = pa.array(range(candidates.num_rows), pa.int64())
    connection.register("annotations", candidates.append_column("place", places))
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _verdicts(connection: duckdb.DuckDBPyConnection, where: str) -> duckdb.DuckDBPyRelation:
    """Columns place and keep, one row per candidate."""
    predicate = duckdb.SQLExpression(where)  # parses exactly one expression
    candidates = connection.table("annotations")
    candidates.filter(predicate)  # WHERE refuses aggregates and window functions, SELECT would not
    passes = predicate & duckdb.ColumnExpression("reason").isnull()
    keep = duckdb.CoalesceOperator(passes, duckdb.ConstantExpression(False))
    return candidates.select(duckdb.ColumnExpression("place"), keep.alias("keep"))


def _predicate_error(where: str, what: str) -> str:
    return f"publish.where {where!r}: {what}; the columns are {', '.join(PREDICATE_SCHEMA.names)}"
